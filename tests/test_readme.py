"""README shows what the code is: the table of options, the loop, the files."""

import re

from conftest import ROOT

from fullft.config.config import Config
from fullft.config.declare import options_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_options_is_the_one_that_the_code_prints() -> None:
    shown = README.split("<!-- options: python -m fullft.config.config -->")[1].split("<!-- /options -->")[0]
    assert shown.strip() == options_table(Config).strip()


def test_every_line_of_the_loop_shown_is_in_train_py() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = {line.split("  #")[0].strip() for line in (ROOT / "train.py").read_text(encoding="utf-8").splitlines()}
    lines = [line.split("  #")[0].strip() for line in shown.splitlines()]
    lines = [line for line in lines if line and line != "..." and not line.startswith("#")]
    assert len(lines) > 15
    assert [line for line in lines if line not in code] == []


def test_every_file_of_the_package_is_in_the_tree() -> None:
    tree = README.split("## The files")[1]
    files = [path.name for path in (ROOT / "fullft").glob("*.py") if path.name != "__init__.py"]
    folders = [path.name for path in (ROOT / "fullft").iterdir() if path.is_dir() and not path.name.startswith("_")]
    assert [name for name in [*files, *(f"{folder}/" for folder in folders)] if name not in tree] == []


def test_train_py_is_at_most_150_lines() -> None:
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= 150
