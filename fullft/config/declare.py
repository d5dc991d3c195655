"""How options are declared and shown.

A dataclass of `option(...)` fields yields the flags, the YAML keys, `--help` and the table of the documentation.

Reading them is the business of `parse.py`; which options there are stands in `options.py`.
"""

from collections.abc import Mapping
from dataclasses import Field, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    group: str = "",
    metavar: str = "",
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    called: tuple[str, ...] = (),
    spellings: Mapping[str, str | None] | None = None,
    bare: str | None = None,
    several: bool = False,
    is_path: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    shown: str = "",
    may_change: bool = False,
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: its value when it is not set.
        help: one phrase, for `--help` and the table.
        unit: the unit of its value.
        group: the heading that this option begins; the ones declared after it belong there too.
        metavar: what `--help` shows for its value, where type and choices do not say it.
        choices: the values (of a mapping: the keys) that it may take; `every_<n>` stands for any n >= 1.
        aliases: other flag names.
        called: what other programs call it: not accepted, but the error names ours.
        spellings: other ways to write a value, such as Hugging Face's; lower case, with underscores.
        bare: the value that the flag has without one.
        several: whether its value is a list of words, kept joined by commas.
        is_path: whether its value may be a path, in which `~` is the home folder.
        at_least: the least number allowed.
        above: the number that it must exceed.
        below: the number that it must stay under.
        shown: what `--help` shows as the default, where the value itself says nothing.
        may_change: whether a resumed run may change it, because it does not change the training.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def by_name(options: type) -> dict[str, "Field[Any]"]:
    """Return the declared options by name."""
    return {option.name: option for option in fields(options)}


def names_of(options: type) -> dict[str, str]:
    """Map every name that an option answers to, aliases included, to its own."""
    return {alias: option.name for option in fields(options) for alias in (option.name, *option.metadata["aliases"])}


def kind_of(option: "Field[Any]") -> Any:
    """Return the type of an option's value: the `int` of `int | None`, the `dict` of `dict[str, str]`."""
    members = get_args(option.type) if isinstance(option.type, UnionType) else (option.type,)
    return next(get_origin(member) or member for member in members if member is not NoneType)


# ---------------------------------------------------------------------------------------------- showing


def groups_of(options: type) -> dict[str, list["Field[Any]"]]:
    """List the options by group, in the order in which they are declared."""
    grouped: dict[str, list[Field[Any]]] = {}
    group = ""
    for option in fields(options):
        group = option.metadata["group"] or group
        grouped.setdefault(group, []).append(option)
    return grouped


def shown_default(option: "Field[Any]") -> str:
    """Write an option's default as `--help` shows it."""
    if option.metadata["shown"]:
        return str(option.metadata["shown"])
    if isinstance(option.default, bool):
        return str(option.default).lower()
    # 2e-5, where Python writes 2e-05
    return f"{option.default:g}".replace("e-0", "e-") if isinstance(option.default, float) else str(option.default)


def shown_help(option: "Field[Any]") -> str:
    """Write an option's meaning, unit and choices."""
    meta = option.metadata
    unit = f" [{meta['unit']}]" if meta["unit"] else ""
    choices = f": {', '.join(meta['choices'])}" if meta["choices"] else ""
    return f"{meta['help']}{unit}{choices}"


def metavar_of(option: "Field[Any]") -> str:
    """Name an option's value: by what it is, in brackets where it may be left out."""
    kind = kind_of(option)
    name = str(option.metadata["metavar"]) or {bool: "true|false", int: "N", float: "X"}.get(kind, "NAME")
    return f"[{name}]" if kind is bool or option.metadata["bare"] is not None else name


def options_table(options: type) -> str:
    """Write the table of options of docs/reference/options.md."""
    lines = ["| option (default) | meaning |", "|---|---|"]
    for group, members in groups_of(options).items():
        lines.append(f"| **{group}** | |")
        for option in members:
            names = ", ".join(f"`--{name}`" for name in (option.name, *option.metadata["aliases"]))
            text = shown_help(option).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {names} ({shown_default(option).replace('<', '&lt;')}) | {text} |")
    return "\n".join(lines)
