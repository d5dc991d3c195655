"""How options are declared, read and shown: one dataclass yields the flags, the YAML keys, `--help` and README's table.

Owns conversion and its messages; which options there are is `config.py`'s business. Imports nothing heavy, so that
`--help` and a mistyped flag answer at once.
"""

import argparse
import difflib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    group: str = "",
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    spellings: Mapping[str, str] | None = None,
    bare: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    shown: str = "",
    may_change: bool = False,
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: its value when nobody sets it.
        help: one phrase for `--help` and the README.
        unit: the unit of its value.
        group: the heading that this option begins; the ones declared after it belong there too.
        choices: the values (of a mapping: the keys) that it may take; `every_<n>` stands for any n >= 1.
        aliases: other flag names.
        spellings: other ways to write a value, such as Hugging Face's.
        bare: the value that the flag has without one.
        at_least: the least number allowed.
        above: the number that it must exceed.
        below: the number that it must stay under.
        shown: what `--help` shows as the default, where the value itself would say nothing.
        may_change: whether a resumed run may differ in it, because it leaves the training itself alone.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def by_name(options: type) -> dict[str, "Field[Any]"]:
    """Give the declared options by name."""
    return {option.name: option for option in fields(options)}


def _names(options: type) -> dict[str, str]:
    """Map every name that an option answers to, aliases included, to its own."""
    return {alias: option.name for option in fields(options) for alias in (option.name, *option.metadata["aliases"])}


# ---------------------------------------------------------------------------------------------- reading

_BARE = object()  # a flag without a value


def read_flags(options: type, argv: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Turn a command line into converted values.

    Args:
        options: the dataclass that declares them.
        argv: the words after the program's name.
        problems: collects what is wrong, one message each.

    Returns:
        The values given, by option name; the path behind `--config` as `config`.
    """
    spelled = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    given, unknown = build_parser(options).parse_known_args(spelled)
    after_unknown_flag = False
    for word in unknown:
        name = word.split("=")[0]
        if word.startswith("-"):
            problems.append(f"unknown option {name}{_suggest(name.lstrip('-'), [*_names(options), 'config'], '--')}")
        elif not after_unknown_flag:
            problems.append(f"unexpected argument {word!r}: options are written --name value")
        after_unknown_flag = word.startswith("-") and "=" not in word
    values: dict[str, Any] = {}
    declared = by_name(options)
    for name, raw in vars(given).items():
        if name == "config":
            if raw is _BARE:
                problems.append("--config needs a YAML file")
            else:
                values[name] = raw
        else:
            _convert_into(values, declared[name], raw, f"--{name}", problems)
    return values


def read_yaml(options: type, path: str, problems: list[str]) -> dict[str, Any]:
    """Turn a YAML file of `option: value` lines into converted values.

    Args:
        options: the dataclass that declares them.
        path: the file.
        problems: collects what is wrong, one message each.
    """
    import yaml  # only here: most runs need no YAML

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"--config {path}: {getattr(error, 'strerror', None) or error}")
        return {}
    except yaml.YAMLError as error:
        problems.append(f"--config {path} is not YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"--config {path} must hold `option: value` lines")
        return {}
    values: dict[str, Any] = {}
    names = _names(options)
    for key, raw in content.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            problems.append(f"{path}: unknown option {key}{_suggest(str(key), list(names), '')}")
        elif raw is not None:
            _convert_into(values, by_name(options)[name], raw, f"{path}: {key}", problems)
    return values


def _suggest(name: str, known: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else "; --help lists them all"


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
    kind, meta = _kind(option), option.metadata
    if raw is _BARE:
        if kind is bool:
            return True
        if meta["bare"] is None:
            raise ValueError("needs a value")
        return meta["bare"]
    if isinstance(raw, bool) and kind is str:
        # YAML reads `no` as false, and `--gradient_checkpointing true` is what Hugging Face's users type.
        raw = "no" if not raw and "no" in meta["choices"] else str(raw).lower()
    if kind is dict:
        return _convert_pairs(raw, meta)
    if kind is bool:
        return _convert_bool(raw)
    if kind in (int, float):
        return _convert_number(raw, kind, meta)
    return _convert_text(str(raw), meta)


def _kind(option: "Field[Any]") -> Any:
    """Give the type of an option's value: the `int` of `int | None`, the `dict` of `dict[str, str]`."""
    members = get_args(option.type) if isinstance(option.type, UnionType) else (option.type,)
    return next(get_origin(member) or member for member in members if member is not NoneType)


def _convert_bool(raw: Any) -> bool:
    word = str(raw).lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"{raw!r} is neither true nor false")


def _convert_number(raw: Any, kind: Any, meta: Mapping[str, Any]) -> int | float:
    unit = f" ({meta['unit']})" if meta["unit"] else ""
    try:
        if isinstance(raw, bool):
            raise ValueError
        value = float(raw)
        if not math.isfinite(value) or (kind is int and value != int(value)):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{raw!r} is not {'a whole number' if kind is int else 'a number'}{unit}") from None
    for name, words, holds in (
        ("at_least", "at least", operator.ge),
        ("above", "above", operator.gt),
        ("below", "below", operator.lt),
    ):
        if meta[name] is not None and not holds(value, meta[name]):
            raise ValueError(f"{raw} must be {words} {meta[name]:g}{unit}")
    return int(value) if kind is int else value


def _convert_text(word: str, meta: Mapping[str, Any]) -> str:
    choices = meta["choices"]
    if not choices:
        return word
    word = (meta["spellings"] or {}).get(word.lower(), word.lower())
    patterns = [re.escape(choice).replace("<n>", "[1-9][0-9]*") for choice in choices]
    if not any(re.fullmatch(pattern, word) for pattern in patterns):
        raise ValueError(f"{word!r} is not one of {', '.join(choices)}")
    return word


def _convert_pairs(raw: Any, meta: Mapping[str, Any]) -> dict[str, str]:
    pairs = raw.items() if isinstance(raw, dict) else [str(word).partition("=")[::2] for word in raw]
    for key, value in pairs:
        if key not in meta["choices"]:
            raise ValueError(f"{key!r} is not one of {', '.join(meta['choices'])}; write ours=yours")
        if not value:
            raise ValueError(f"{key!r} needs a value: {key}=yours")
    return {str(key): str(value) for key, value in pairs}


# ---------------------------------------------------------------------------------------------- showing


def _groups(options: type) -> dict[str, list["Field[Any]"]]:
    """List the options by group, in the order in which they are declared."""
    grouped: dict[str, list[Field[Any]]] = {}
    group = ""
    for option in fields(options):
        group = option.metadata["group"] or group
        grouped.setdefault(group, []).append(option)
    return grouped


def _shown_default(option: "Field[Any]") -> str:
    if option.metadata["shown"]:
        return str(option.metadata["shown"])
    if isinstance(option.default, bool):
        return str(option.default).lower()
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def _shown_help(option: "Field[Any]") -> str:
    meta = option.metadata
    unit = f" [{meta['unit']}]" if meta["unit"] else ""
    choices = f"; {', '.join(meta['choices'])}" if meta["choices"] else ""
    return f"{meta['help']}{unit}{choices}"


def build_parser(options: type) -> argparse.ArgumentParser:
    """Build the command line of a dataclass of options; `parse_args` of it prints `--help`."""
    # Every value is optional for argparse, and no type is converted by it: it would stop at the first problem.
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fully fine-tune a causal language model: every parameter, in one readable loop.",
        epilog="A flag beats the --config file. Exit codes: 0 done, 2 options, 3 data, 4 model, 5 checkpoint, "
        "6 disk, 7 non-finite loss or gradient, 8 out of memory, 128+signal.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", nargs="?", const=_BARE, metavar="FILE", help="YAML file of options")
    for group, members in _groups(options).items():
        section = parser.add_argument_group(group)
        for option in members:
            takes: dict[str, Any] = {"nargs": "?", "const": _BARE, "metavar": option.name.split("_")[-1].upper()}
            if _kind(option) is dict:
                takes = {"nargs": "*", "metavar": "OURS=YOURS"}
            section.add_argument(
                *(f"--{alias}" for alias in (option.name, *option.metadata["aliases"])),
                dest=option.name,
                **takes,
                help=f"{_shown_help(option)} ({_shown_default(option)})".replace("%", "%%"),
            )
    return parser


def options_table(options: type) -> str:
    """Write README's table of options, in Markdown."""
    lines = ["| option (default) | meaning |", "|---|---|"]
    for group, members in _groups(options).items():
        lines.append(f"| **{group}** | |")
        for option in members:
            names = ", ".join(f"`--{name}`" for name in (option.name, *option.metadata["aliases"]))
            text = _shown_help(option).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {names} ({_shown_default(option).replace('<', '&lt;')}) | {text} |")
    return "\n".join(lines)
