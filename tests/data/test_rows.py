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


def load(path: Path, **options: Any) -> Rows:
    return load_rows(make_config(dataset=str(path), **options))


def load_json(tmp_path: Path, rows: list[Row]) -> Rows:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load(path)


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
