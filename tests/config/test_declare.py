"""How options are shown: `--help` and the table of the documentation."""

import re

import pytest

from fullft.config.declare import by_name, options_table
from fullft.config.options import Options
from fullft.config.parse import build_parser

# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_screen_and_names_everything(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = build_parser(Options).format_help()
    assert max(map(len, text.splitlines())) <= columns
    assert columns == 80 or max(map(len, text.splitlines())) > 80  # the wide one is used
    flat = " ".join(text.split())
    for name, option in by_name(Options).items():
        unit = f"[{option.metadata['unit']}]"
        entry = re.search(rf"--{name}\b.*?\(default: .*?\)", flat)
        assert entry and (unit == "[]" or unit in entry[0]), name
    for group in ("model and data:", "run:", "optimization:", "precision and memory:", "records:"):
        assert f"\n{group}\n" in text
    for shown in ("--max_length N", "--learning_rate X", "--packing [true|false]", "--output_dir FOLDER", "2e-5"):
        assert shown in flat


def test_the_table_of_options_lists_every_flag() -> None:
    table = options_table(Options)
    for name, option in by_name(Options).items():
        for flag in (name, *option.metadata["aliases"]):
            assert f"`--{flag}`" in table
    assert len(table.splitlines()) == 2 + len(by_name(Options)) + 5
