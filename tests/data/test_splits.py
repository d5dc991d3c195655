"""Splits: which rows are trained on and which are held out, whatever a data set keeps its splits in."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from models import make_config

from fullft.data.sources import load_held_out_rows, load_rows
from fullft.errors import DataError

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(6)]
LINES = [json.dumps(row) for row in ROWS]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path: Path, **options: Any) -> list[dict[str, Any]]:
    return load_rows(make_config(dataset=str(path), **options)).to_list()


def message(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **options)
    return str(caught.value)


@pytest.fixture(params=["names", "folders", "shards", "parquet", "packed", "card", "saved"])
def three_splits(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A data set of 3 training, 2 validation and 1 test rows."""
    splits = {"train": range(3), "validation": range(3, 5), "test": range(5, 6)}
    folder = tmp_path / "set"
    if request.param == "saved":
        saved = {split: Dataset.from_list([ROWS[i] for i in numbers]) for split, numbers in splits.items()}
        DatasetDict(saved).save_to_disk(str(folder))
        return folder
    name = {
        "names": "{}.jsonl",
        "folders": "{}/rows.jsonl",
        "shards": "data/{}-00000-of-00001.jsonl",
        "parquet": "data/{}-00000-of-00001.parquet",
        "packed": "{}.ndjson.gz",
        "card": "rows/{}-of-all.jsonl",
    }[request.param]
    for split, numbers in splits.items():
        path = folder / name.format(f"part_{split[1]}" if request.param == "card" else split)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "\n".join(LINES[i] for i in numbers).encode()
        if request.param == "parquet":
            Dataset.from_list([ROWS[i] for i in numbers]).to_parquet(path)
        else:
            write(path, gzip.compress(content) if request.param == "packed" else content)
    if request.param == "card":
        files = "".join(f"  - {{split: {split}, path: rows/part_{split[1]}*}}\n" for split in splits)
        write(folder / "README.md", f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    return folder


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        (None, (0, 1, 2)),
        ("train", (0, 1, 2)),
        ("test", (5,)),
        ("validation", (3, 4)),
        ("train+validation[:1]", (0, 1, 2, 3)),
        ("test+train[-1:]", (5, 2)),
        ("validation[50%:]", (4,)),
    ],
)
def test_only_rows_of_the_split_are_loaded(split: str | None, numbers: Any, three_splits: Path) -> None:
    options = {} if split is None else {"dataset_split": split}
    assert load(three_splits, **options) == [ROWS[i] for i in numbers]


def held_out(path: Path, **options: Any) -> list[dict[str, Any]] | None:
    rows = load_held_out_rows(make_config(dataset=str(path), **options))
    return None if rows is None else rows.to_list()


def test_held_out_rows_come_from_a_split(three_splits: Path) -> None:
    assert held_out(three_splits) is None
    assert held_out(three_splits, eval_split="validation") == ROWS[3:5]
    assert held_out(three_splits, eval_split="validation[:1]+test") == [ROWS[3], ROWS[5]]
    with pytest.raises(DataError, match='"dev"'):
        held_out(three_splits, eval_split="dev")


def test_held_out_rows_come_from_elsewhere(three_splits: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "other.jsonl", LINES[0])
    assert held_out(path, eval_dataset=str(three_splits), eval_split="test") == ROWS[5:]
    with pytest.raises(DataError, match="has the splits train, validation, test: name one with --eval_split") as caught:
        held_out(path, eval_dataset=str(three_splits))
    assert caught.value.exit_code == 3
    # A file, and a folder with one split, whatever it is called.
    assert held_out(three_splits, eval_dataset=str(path)) == ROWS[:1]
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "test.jsonl", LINES[2])
    assert held_out(path, eval_dataset=str(tmp_path / "one")) == ROWS[2:3]


def test_held_out_columns_are_renamed_too(tmp_path: Path) -> None:
    train, test = (write(tmp_path / name, '{"q": "1", "a": "2"}') for name in ("train.jsonl", "test.jsonl"))
    wanted = {"instruction": "q", "output": "a"}
    assert held_out(train, eval_dataset=str(test), columns=wanted) == [{"instruction": "1", "output": "2"}]


def test_splits_of_different_columns_are_not_joined(tmp_path: Path) -> None:
    Dataset.from_list([{"text": "x"}]).to_parquet(tmp_path / "train.parquet")
    Dataset.from_list([{"text": 5}]).to_parquet(tmp_path / "test.parquet")
    assert "have columns of other types" in message(tmp_path, dataset_split="train+test")
    assert load(tmp_path, dataset_split="train") == [{"text": "x"}]


def test_hub_ids_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_list([{"q": name, "a": split}])

    splits = {"user/one": ["test"], "user/three": ["train", "validation", "test"]}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", splits.__getitem__)
    wanted = {"instruction": "q", "output": "a"}

    def taken(**options: Any) -> Any:
        rows = load_held_out_rows(make_config(dataset="user/three", columns=wanted, **options))
        return None if rows is None else (rows[0], rows.place(0))

    def expected(name: str, split: str) -> Any:
        return {"instruction": name, "output": split}, f"{name}, split {split}, row 1"

    assert taken() is None
    assert taken(eval_split="validation") == expected("user/three", "validation")
    assert taken(eval_dataset="user/one") == expected("user/one", "test")
    assert taken(eval_dataset="user/one", eval_split="test[:5]") == expected("user/one", "test[:5]")
    with pytest.raises(DataError, match="user/three has the splits train, validation, test: name one with"):
        taken(eval_dataset="user/three")
    with pytest.raises(DataError, match="data set user/gone was found neither"):
        taken(eval_dataset="user/gone")
    assert asked == [("user/three", "validation"), ("user/one", "test"), ("user/one", "test[:5]")]
