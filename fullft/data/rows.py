"""The rows of a data set, under our column names, each with the place that it comes from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Json

from fullft.data.rendered import Row

# The columns of a table that keeps rows as JSON text, as data files of text are kept.
FILE, LINE, COLUMNS, TEXT = "file", "line", "columns", "row"


@dataclass(frozen=True)
class Rows:
    """Rows as they were read.

    Attributes:
        name: of the data set, for messages.
        split: that they are from.
        table: a row per row: JSON text with its place, or columns of the types that the data set has.
        columns: our name of each column, under its name in the data.
        is_text: whether the table keeps JSON text.
        left_out: files of the data set's folder that were not read.
    """

    name: str
    split: str
    table: Dataset
    columns: dict[str, str]
    is_text: bool
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def column_names(self) -> list[str]:
        """Our names of the columns."""
        return list(self.columns.values())

    @property
    def key(self) -> str:
        """Changes when the rows do."""
        # A private fingerprint: a hash of all content would read every row anew.
        return f"{self.table._fingerprint} {self.columns}"

    def decode(self, batch: dict[str, list[Any]]) -> list[Row]:
        """Return the rows of some of the table's columns; a column that a row lacks is None.

        Args:
            batch: a list of values under the name of each of the table's columns.
        """
        if not self.is_text:
            names = [name for name in batch if name in self.columns]
            is_nested = {name: not isinstance(self.table.features[name], Json) for name in names}
            return [
                {
                    self.columns[name]: _without_nulls(value) if is_nested[name] else value
                    for name, value in zip(names, values, strict=True)
                }
                for values in zip(*(batch[name] for name in names), strict=True)
            ]
        rows = []
        for text in batch[TEXT]:
            row = json.loads(text)
            row = {"text": row} if isinstance(row, str) else row
            rows.append({ours: row.get(name) for name, ours in self.columns.items()})
        return rows

    def __getitem__(self, index: int) -> Row:
        return self.decode(self.table[index : index + 1])[0]

    def to_list(self) -> list[Row]:
        """Return all rows."""
        return self.decode(self.table[:])

    def place(self, index: int) -> str:
        """Name where a row stands: file and line, or data set, split and row.

        Args:
            index: its number in the table, from 0.
        """
        if self.is_text:
            row = self.table[index]
            return f"{row[FILE]}, line {row[LINE]}"
        return f"{self.name}, split {self.split}, row {index + 1}"


def cache_folder(key: str) -> Path:
    """Return the folder for what is kept of rows, beside what `datasets` keeps: nobody's data is written into.

    Args:
        key: changes when the rows do.
    """
    return Path(datasets.config.HF_DATASETS_CACHE) / "fullft" / key


def rename(found: Sequence[str], name: str, wanted: dict[str, str], text_field: str) -> dict[str, str]:
    """Give columns our names, all at once, so that two may swap; a column whose name is taken gives way.

    Args:
        found: the columns of the data.
        name: of the data set, for messages.
        wanted: the data's name under ours, as `--columns` has them.
        text_field: the column of plain text. Another one than `text` says that rows are that text, and nothing else.

    Returns:
        Our name under the data's.

    Raises:
        ValueError: naming the option whose column is missing or has two names.
    """
    sources = wanted | ({} if text_field == "text" else {"text": text_field})
    for ours, theirs in sources.items():
        option = f"--columns {ours}={theirs}" if ours in wanted else f"--dataset_text_field {theirs}"
        if theirs not in found:
            raise ValueError(f"{option}: {name} has no column {theirs}; it has {', '.join(found)}")
        if list(sources.values()).count(theirs) > 1:
            raise ValueError(f"{option}: the column {theirs} is given two names; one column has one role")
    if text_field != "text":
        return {text_field: "text"}
    new_names = {theirs: ours for ours, theirs in sources.items()}
    return {each: new_names.get(each, each) for each in found if each in new_names or each not in sources}


def _without_nulls(value: Any) -> Any:
    """Leave out null entries: Arrow gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
