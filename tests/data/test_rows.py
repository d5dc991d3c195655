"""Rows as they were read: values come back as the file has them, whatever the rows around them have."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from models import make_config

from fullft.data.rows import Rows
from fullft.data.sources import load_rows

Row = dict[str, Any]
ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(6)]
LINES = [json.dumps(row) for row in ROWS]


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def load(path: Path, **options: Any) -> Rows:
    return load_rows(make_config(dataset=str(path), **options))


def load_json(tmp_path: Path, rows: list[Row]) -> Rows:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load(path)


def place(path: Path, index: int, **options: Any) -> str:
    """Locate a loaded row, as an error message would."""
    return load(path, **options).place(index)


# Each pair would be one type to a table of columns, which would change one of them or refuse both.
@pytest.mark.parametrize(
    "values",
    [
        ("2020-01-01", "2021-12-31T23:59:59Z"),
        ("12", "0.5"),
        ("true", "false"),
        (0.1234567890123, 1),
        (10**20, -(10**25)),
        ("text", ["a", {"b": None}]),
        ({"a": 1}, {"b": "x"}),
        ({"a": 1}, {"a": "1"}),
        ([1, "1", None, [1.0]], []),
        ({"city": "Oslo", "unit": None}, {"city": None, "days": 3}),
        ({}, []),
        (True, 1),
    ],
    ids=str,
)
def test_values_of_a_column_keep_their_own_types(values: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"value": values[i % 2], "messages": [{"call": {"arguments": values[i % 2]}}]} for i in range(4)]
    assert json.dumps(load_json(tmp_path, rows).to_list()) == json.dumps(rows)


def test_a_column_that_a_row_lacks_is_none(tmp_path: Path) -> None:
    rows = load_json(tmp_path, [{"a": "1"}, {"b": {"c": None}}, {"a": None, "b": None}])
    assert rows.column_names == ["a", "b"]
    assert rows.to_list() == [{"a": "1", "b": None}, {"a": None, "b": {"c": None}}, {"a": None, "b": None}]
    assert rows[1] == {"a": None, "b": {"c": None}}


def test_a_list_of_texts_is_a_column_of_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('["one", {"text": "two"}, "thr\\u00e9e"]')
    assert load(path).to_list() == [{"text": "one"}, {"text": "two"}, {"text": "thrée"}]


def test_parquet_leaves_out_the_keys_of_other_rows(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "a", "content": "x"}]}, {"messages": [{"role": "b", "calls": [{"x": 1}, {"y": 2}]}]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet").to_list() == rows


def test_the_key_changes_with_rows_and_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "1", "b": "2"}\n{"a": "3", "b": "4"}\n')
    options: list[Row] = [
        {},
        {"columns": {"text": "a"}},
        {"columns": {"text": "b"}},
        {"dataset_text_field": "a"},
        {"dataset_split": "train[:1]"},
        {"dataset_split": "train[1:]"},
    ]
    keys = [load(path, **each).key for each in options]
    assert len(set(keys)) == len(keys)
    assert keys == [load(path, **each).key for each in options]


# ---------------------------------------------------------------------------------------------- locating


def test_a_row_is_located_whatever_the_split_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n\n".join(LINES))
    assert place(path, 1) == f"{path}, line 3"
    assert place(path, 1, dataset_split="train[2:]") == f"{path}, line 7"


def test_a_row_is_located_under_renamed_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(LINES))
    swapped = {"instruction": "output", "output": "instruction"}
    assert place(path, 4, columns=swapped) == f"{path}, line 5"
    assert place(path, 4, dataset_text_field="output") == f"{path}, line 5"


def test_a_row_with_filled_in_keys_is_located(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i), "name": None}]} for i in range(3)]
    rows[2]["messages"][0]["name"] = "n"
    del rows[0]["messages"][0]["name"]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [place(path, i) for i in range(3)] == [f"{path}, line {i + 1}" for i in range(3)]
    Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    assert place(tmp_path / "b.parquet", 1) == f"{tmp_path / 'b.parquet'}, split train, row 2"


def test_a_row_of_a_json_array_is_located(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    above = path.read_text().splitlines().index('  "instruction": "q3",')  # the line of its brace
    assert place(path, 3) == f"{path}, line {above}"


def test_a_csv_row_is_located_where_it_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'instruction,output\na,"x\ny"\nb,"z\nz"\n')
    assert [place(path, 0), place(path, 1)] == [f"{path}, line 2", f"{path}, line 4"]
