"""Reading options: flags and a YAML file become an `Options` object, and all mistakes become one message.

Imports nothing heavy: `--help` and a mistyped flag answer at once.
"""

import argparse
import difflib
import math
import operator
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from fullft.config.checks import find_idle_flags, find_problems
from fullft.config.config import Config, resolve
from fullft.config.declare import by_name, groups_of, kind_of, metavar_of, names_of, shown_default, shown_help
from fullft.config.options import DEMO_FOLDER, Options
from fullft.config.ranks import find_place
from fullft.errors import OptionsError


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Read flags and, with `--config`, a YAML file; check them; fill in what follows from them.

    Args:
        argv: the command line without the program; `sys.argv[1:]` by default.

    Raises:
        OptionsError: naming every unknown, malformed or contradictory option at once.
    """
    problems: list[str] = []
    flags = read_flags(Options, sys.argv[1:] if argv is None else argv, problems)
    file = read_yaml(Options, os.path.expanduser(flags.pop("config")), problems) if "config" in flags else {}
    given = _beaten_by(flags, file) | flags
    # Without a model everything that is not given comes from the demo.
    base = {} if given.get("model") is not None else read_yaml(Options, str(DEMO_FOLDER / "demo.yaml"), problems)
    if "output_dir" in given:
        base.pop("overwrite_output_dir", None)  # the demo overwrites its own folder, never one that the user names
    options = replace(Options(), **(_beaten_by(given, base) | given))
    problems += find_problems(options, given)
    problems += find_idle_flags(options, flags)
    if problems:
        raise OptionsError("\n       ".join(dict.fromkeys(problems)))
    return resolve(options)


def _beaten_by(flags: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from a file's values what flags beat under another name: the options of the batch are one choice.

    A run's own config.yaml holds all that apply, and one flag must be enough to change the batch.
    """
    micro, accumulation, whole = "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"
    tokens = "micro_batch_tokens"
    beaten = set()
    if tokens in flags:
        beaten = {micro, accumulation}
    elif accumulation in flags and whole not in flags:
        beaten = {whole}
    elif whole in flags or (whole in file and (micro in flags or _has_other_ranks(flags, file))):
        beaten = {accumulation}
    if tokens not in flags and flags.keys() & {micro, accumulation, whole}:
        beaten |= {tokens}
    return {name: value for name, value in file.items() if name not in beaten}


def _has_other_ranks(flags: Mapping[str, Any], file: Mapping[str, Any]) -> bool:
    """Return whether other ranks train than a file is of."""
    ranks, started = file.get("gpus") or 1, find_place().count
    return (started if started > 1 else flags.get("gpus", ranks)) != ranks


# ---------------------------------------------------------------------------------------------- reading

_BARE = object()  # stands for the value of a flag that has none
_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")


def read_flags(options: type, argv: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Read a command line into converted values.

    Args:
        options: the dataclass that declares them.
        argv: the words after the program's name.
        problems: collects what is wrong, one message each.

    Returns:
        The values given, by option name; the path behind `--config` as `config`.
    """
    given, unknown = build_parser(options).parse_known_args(_spell(argv))
    after_unknown_flag = False
    for word in unknown:
        name = word.split("=")[0]
        if word.startswith("-"):
            problems.append(f"unknown option {name}{_suggest(name, options, '--')}")
        elif not after_unknown_flag:
            problems.append(f"unexpected argument {word!r}: options are written --name value")
        after_unknown_flag = word.startswith("-") and "=" not in word
    values: dict[str, Any] = {}
    declared = by_name(options)
    for name, raw in vars(given).items():
        if name != "config":
            _convert_into(values, declared[name], raw, f"--{name}", problems)
        elif raw is _BARE or not raw:
            problems.append("--config needs a YAML file")
        else:
            values[name] = raw
    return values


def _spell(argv: Sequence[str]) -> list[str]:
    """Write hyphens in flag names as underscores, and negative numbers as argparse reads them: `--flag=-1e-5`."""
    words: list[str] = []
    for word in argv:
        if words and re.fullmatch(r"--[^=]+", words[-1]) and re.match(r"-(\.?\d|inf|nan)", word):
            words[-1] += f"={word}"
        else:
            words.append(re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word))
    return words


def read_yaml(options: type, path: str, problems: list[str]) -> dict[str, Any]:
    """Read a YAML file of `option: value` lines into converted values; null leaves an option at its default.

    Args:
        options: the dataclass that declares them.
        path: the file.
        problems: collects what is wrong, one message each.
    """
    names, declared = names_of(options), by_name(options)
    values: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for key, raw in _yaml_items(path, problems):
        name = names.get(key.replace("-", "_"))
        if name is None:
            problems.append(f"{path}: unknown option {key}{_suggest(key, options, '')}")
        elif name in seen:
            problems.append(f"{path}: {key} sets {name} a second time, after {seen[name]}: keep one of the two")
        elif raw is not None:
            _convert_into(values, declared[name], raw, f"{path}: {key}", problems)
        if name is not None:
            seen.setdefault(name, key)
    return values


def _yaml_items(path: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the lines of a YAML file, repeated keys too, which `safe_load` would drop in silence."""
    import yaml  # only here: most runs need no YAML

    try:
        text, loader = Path(path).read_text(encoding="utf-8-sig"), _loader_of_words()
        content, root = yaml.load(text, loader), yaml.compose(text, loader)
    except UnicodeDecodeError as error:
        problems.append(f"--config {path} is not UTF-8 text (byte {error.start})")
    except OSError as error:
        problems.append(f"--config {path}: {error.strerror}")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        problems.append(f"--config {path}{place}: not YAML: {getattr(error, 'problem', None) or error}")
    else:
        if isinstance(content, dict) and isinstance(root, yaml.MappingNode):
            keys = [str(key.value) for key, _ in root.value]
            yield from ((str(key), raw) for key, raw in content.items())
            yield from ((key, None) for number, key in enumerate(keys) if key in keys[:number])
            for key, value in root.value:
                within = [entry.value for entry, _ in value.value] if isinstance(value, yaml.MappingNode) else []
                twice = dict.fromkeys(entry for number, entry in enumerate(within) if entry in within[:number])
                problems += [f"{path}: {key.value}: {entry} stands there twice: keep one of the two" for entry in twice]
        elif content is not None:
            problems.append(f"--config {path} must hold `option: value` lines")


def _loader_of_words() -> Any:
    """Make a loader that leaves values as they are written, but for null; each option knows what its words mean.

    YAML 1.1 has values of its own for some of them: `off` is false, 010 is 8, 12:30 is 750, 1.10 is 1.1.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    return Loader


def _suggest(word: str, options: type, prefix: str) -> str:
    """Name the option that was probably meant, or where all are listed."""
    name = word.lstrip("-").lower().replace("-", "_")
    known = {other: option.name for option in fields(options) for other in option.metadata["called"]}
    known |= {spelling: spelling for spelling in (*names_of(options), *(("config", "help") if prefix else ()))}
    if name.startswith("no_") and name[3:] in known:
        return f"; did you mean {prefix}{name[3:]}{' ' if prefix else ': '}false?"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    near = near or [full for full in known if name and full.startswith(name)]
    return f"; did you mean {prefix}{known[near[0]]}?" if near else "; --help lists them all"


def _convert_into(values: dict[str, Any], option: "Field[Any]", raw: Any, source: str, problems: list[str]) -> None:
    try:
        values[option.name] = _convert(option, raw)
    except ValueError as error:
        problems.append(f"{source}: {error}")


def _convert(option: "Field[Any]", raw: Any) -> Any:
    """Bring a word of the command line or a YAML value to the option's type.

    Raises:
        ValueError: saying what the option expects.
    """
    kind, meta = kind_of(option), option.metadata
    if raw is _BARE and (kind is bool or meta["bare"] is not None):
        return True if kind is bool else meta["bare"]
    if raw is _BARE or raw in ("", []):
        raise ValueError("needs a value")
    if kind is dict:
        return _convert_pairs(raw, meta)
    if isinstance(raw, dict) and meta["several"]:
        raw = [f"{key}={value}" for key, value in raw.items()]
    if isinstance(raw, list) and (meta["choices"] or meta["several"]):
        raw = ",".join(map(str, raw))  # Hugging Face writes `report_to: [tensorboard, wandb]`
    if isinstance(raw, (list, dict)):
        raise ValueError(f"takes one value, not a {'list' if isinstance(raw, list) else 'mapping'}")
    if kind is bool:
        return _convert_bool(raw)
    if kind in (int, float):
        word = str(raw).strip().lower()
        return meta["spellings"][word] if word in (meta["spellings"] or {}) else _convert_number(raw, kind, meta)
    text = _convert_text(raw, meta)
    if meta["is_path"] and text is not None:
        text = _expand_home(text)
    return Path(text) if kind is Path and text is not None else text


def _expand_home(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):  # else a folder of that name would appear in the current one
        raise ValueError(f"{expanded.split('/')[0]} is no user's home folder; if it is a name, write ./{path}")
    return expanded


def _convert_bool(raw: Any) -> bool:
    word = str(raw).lower()
    if word in (*_YES, "1"):
        return True
    if word in (*_NO, "0"):
        return False
    raise ValueError(f"{str(raw)!r} is neither true nor false")


def _convert_number(raw: Any, kind: Any, meta: Mapping[str, Any]) -> int | float:
    unit = f" ({meta['unit']})" if meta["unit"] else ""
    try:
        value = _number(str(raw))
        if not math.isfinite(value) or (kind is int and value != int(value)):
            raise ValueError
    except ValueError:
        raise ValueError(f"{str(raw)!r} is not {'a whole number' if kind is int else 'a number'}{unit}") from None
    for name, words, holds in (
        ("at_least", "at least", operator.ge),
        ("above", "above", operator.gt),
        ("below", "below", operator.lt),
    ):
        if meta[name] is not None and not holds(value, meta[name]):
            raise ValueError(f"{raw} must be {words} {meta[name]:,}{unit}")
    return int(value) if kind is int else float(value)


def _number(word: str) -> int | float:
    try:
        return int(word)  # first, because a float has only 53 bits
    except ValueError:
        return float(word)


def _convert_text(raw: Any, meta: Mapping[str, Any]) -> str | None:
    choices, spellings = meta["choices"], meta["spellings"] or {}
    written = str(raw).strip()
    word = written.lower().replace("-", "_")
    # An option that knows one word for yes or no, in any of these ways, knows the others too.
    synonyms = next((words for words in (_YES, _NO) if word in words), ())
    for each in (word, *synonyms):
        if each in spellings:
            value: str | None = spellings[each]
            return value
        for choice in choices:
            pattern = re.escape(choice.replace("-", "_")).replace("<n>", "([1-9][0-9]*)")
            if match := re.fullmatch(pattern, each):
                return str(choice.replace("<n>", match[1])) if match.groups() else str(choice)
    if choices:
        raise ValueError(f"{written!r} is not one of {', '.join(choices)}")
    return written


def _convert_pairs(raw: Any, meta: Mapping[str, Any]) -> dict[str, str]:
    words = raw.split() if isinstance(raw, str) else raw
    if not isinstance(words, (dict, list)):
        raise ValueError(f"{raw!r} is no pair; write ours=yours")
    pairs = list(words.items() if isinstance(words, dict) else [str(word).partition("=")[::2] for word in words])
    for key, value in pairs:
        if key not in meta["choices"]:
            raise ValueError(f"{key!r} is not one of {', '.join(meta['choices'])}; write ours=yours")
        if not value:
            raise ValueError(f"{key!r} needs a value: {key}=yours")
    for side in zip(*pairs, strict=True):
        if twice := next((name for number, name in enumerate(side) if name in side[:number]), None):
            raise ValueError(f"{twice!r} stands in two pairs")
    return {str(key): str(value) for key, value in pairs}


# ---------------------------------------------------------------------------------------------- the command line


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter, but a value is named once per option, and without argparse's brackets."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 120) - 2
        # On a wide screen even the longest flag has its help on the same line.
        super().__init__(prog, max_help_position=38 if width > 100 else 26, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return " ".join([", ".join(action.option_strings), *([str(action.metavar)] if action.metavar else [])])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report what argparse refuses by itself, such as `--help=5`, like everything else."""
        raise OptionsError(message)


def build_parser(options: type) -> argparse.ArgumentParser:
    """Build the command line of a dataclass of options; `parse_args` of it prints `--help`."""
    # Every value is optional for argparse, and no type is converted by it: it would stop at the first problem.
    # Installed, train.py lies within the package, and is called by the command's name.
    is_installed = (DEMO_FOLDER.parent / "train.py").is_file()
    parser = _Parser(
        prog="train.py",
        usage=f"{'fullft' if is_installed else 'python train.py'} [--config run.yaml] [--option value ...]",
        description="Fully fine-tune a causal language model: every parameter, in one readable loop. Without --model "
        "the built-in demo runs, with defaults of its own. Hyphens and underscores both work; a flag beats the file.",
        epilog="Exit codes: 0 done, 2 options, 3 data, 4 model, 5 checkpoint, 6 disk, 7 non-finite loss or gradient, "
        "8 out of memory, 128+signal.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", nargs="?", const=_BARE, metavar="FILE", help="YAML file of `option: value` lines")
    for group, members in groups_of(options).items():
        section = parser.add_argument_group(group)
        for option in members:
            # Several words, and several flags add up.
            pairs = kind_of(option) is dict or option.metadata["several"]
            section.add_argument(
                *(f"--{alias}" for alias in (option.name, *option.metadata["aliases"])),
                dest=option.name,
                metavar=metavar_of(option),
                help=f"{shown_help(option)} (default: {shown_default(option)})".replace("%", "%%"),
                **({"nargs": "*", "action": "extend"} if pairs else {"nargs": "?", "const": _BARE}),
            )
    return parser
