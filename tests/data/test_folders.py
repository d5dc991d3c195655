"""Data folders: each file goes to the split that `datasets.load_dataset` gives it to, and the others are named."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets.data_files import DataFilesDict, get_data_patterns

from fullft.data.folders import DataFiles, find_files
from fullft.errors import DataError

Dealt = dict[str, list[str]]


def write(path: Path, content: str = '{"text": "x"}\n') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def make(folder: Path, *names: str) -> Path:
    """Make files whose row is their own name."""
    for name in names:
        write(folder / name, json.dumps({"text": name}) + "\n")
    return folder


def found(path: Path | str) -> DataFiles:
    files = find_files(str(path))
    assert files is not None
    return files


def dealt(folder: Path) -> Dealt:
    """Return the sorted files of each split, each of which stands there once."""
    assert all(len(set(files)) == len(files) for files in found(folder).splits.values())
    return {split: names(folder, files) for split, files in found(folder).splits.items()}


def names(folder: Path, files: Any) -> list[str]:
    return sorted({str(file.relative_to(folder)) for file in files})


def dealt_by_the_library(folder: Path) -> Dealt:
    """Return the files of each split, once; the library reads a file twice that two of its patterns match."""
    patterns = get_data_patterns(str(folder))
    files = DataFilesDict.from_patterns(patterns, base_path=str(folder), allowed_extensions=[".jsonl"])
    return {str(split): names(folder, map(Path, its_files)) for split, its_files in files.items() if its_files}


def loaded_by_the_library(folder: Path) -> Dealt:
    """Return the rows, which are names, of each split that `load_dataset` makes."""
    loaded = datasets.load_dataset(str(folder))
    return {str(split): sorted(set(rows["text"])) for split, rows in loaded.items()}


def message(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        find_files(str(path))
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- splits by names


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (
            ("train.jsonl", "validation.jsonl", "test.jsonl"),
            {"train": ["train.jsonl"], "validation": ["validation.jsonl"], "test": ["test.jsonl"]},
        ),
        (("training-1.jsonl", "x_dev.1.jsonl"), {"train": ["training-1.jsonl"], "validation": ["x_dev.1.jsonl"]}),
        (("train/a.jsonl", "val/a.jsonl"), {"train": ["train/a.jsonl"], "validation": ["val/a.jsonl"]}),
        (("eval 1/x/a.jsonl", "b/my train/a.jsonl"), {"test": ["eval 1/x/a.jsonl"], "train": ["b/my train/a.jsonl"]}),
        (("train/test.jsonl", "train/b.jsonl"), {"train": ["train/b.jsonl", "train/test.jsonl"]}),
        (("a.jsonl", "sub/b.jsonl"), {"train": ["a.jsonl", "sub/b.jsonl"]}),
        (("contest.jsonl", "trained.jsonl"), {"train": ["contest.jsonl", "trained.jsonl"]}),
        (("Train.jsonl", "test.jsonl"), {"test": ["test.jsonl"]}),
        (("test.jsonl",), {"test": ["test.jsonl"]}),
        (("__a.jsonl", ".b.jsonl", "__c/d.jsonl", ".e/f.jsonl"), {"train": ["__a.jsonl"]}),
        (
            (
                "data/train-00000-of-00002.jsonl",
                "data/train-00001-of-00002-abc.jsonl",
                "data/mine-00000-of-00001.jsonl",
            ),
            {
                "mine": ["data/mine-00000-of-00001.jsonl"],
                "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002-abc.jsonl"],
            },
        ),
    ],
)
def test_files_are_dealt_by_their_names(files: tuple[str, ...], splits: Dealt, tmp_path: Path) -> None:
    folder = make(tmp_path / "train set", *files)  # whose own name says nothing
    assert dealt(folder) == splits
    assert dealt_by_the_library(folder) == splits


_WORDS = "train training validation valid dev val test testing eval evaluation data set x contest trainer Test".split()


def _name(draw: random.Random) -> str:
    return "".join(draw.choice(_WORDS) + draw.choice(["", "", *"-._ 07"]) for _ in range(draw.choice((1, 1, 2))))


@pytest.mark.parametrize("seed", range(60))
def test_random_folders_are_dealt_as_the_library_does(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 5)):
        parts = [_name(draw) for _ in range(draw.choice((0, 0, 1, 1, 2)))]
        shard = "-00000-of-00001" if draw.random() < 0.2 else ""
        make(
            tmp_path, "/".join([*(["data"] if shard and draw.random() < 0.7 else parts), f"{_name(draw)}{shard}.jsonl"])
        )
    try:
        theirs = dealt_by_the_library(tmp_path)
    except ValueError as error:  # of shards such as `my-set-00000-of-00001`, which are dealt by their names here
        assert "Split name should match" in str(error)
        return
    if sum(map(len, theirs.values())) > len({name for its_names in theirs.values() for name in its_names}):
        assert " by its path: give each split a folder of its own" in message(tmp_path)
    else:
        assert dealt(tmp_path) == theirs


def test_a_file_of_two_splits_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "train_eval.jsonl")
    assert message(tmp_path).startswith(f"{tmp_path / 'train_eval.jsonl'} is of the splits train and test by its path")


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "more.jsonl", "rows.parquet.bak", "NOTES.txt", "README.md", ".hidden", "table.xlsx")
    make(tmp_path, "config.json", "LICENSE")
    files = found(tmp_path)
    assert files.splits == {"train": [tmp_path / "train.jsonl"]}
    assert names(tmp_path, files.left_out) == ["NOTES.txt", "more.jsonl", "rows.parquet.bak", "table.xlsx"]


def test_only_files_that_are_read_must_be_of_one_kind(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "requirements.txt")
    assert found(tmp_path).kind == "json"
    make(tmp_path, "test.csv")
    assert "must hold files of one kind; found: csv, json" in message(tmp_path)


# ---------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["set[1]", "a*", "a?", "{a,b}", "two words", "é😀", "[!a]", "-x", "a#b", "100%"])
def test_a_name_means_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "set1.jsonl", "set1/a.jsonl", "ab.jsonl", "a.jsonl", "b.jsonl", "x.jsonl")
    make(tmp_path, f"{name}.jsonl", f"{name}/rows.jsonl")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, Path(name)):
        assert found(f"{path}.jsonl").splits == {"train": [Path(f"{path}.jsonl")]}
        assert found(path).splits == {"train": [path / "rows.jsonl"]}


def test_links_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "rows.jsonl", "more/rows.jsonl")
    folder = make(tmp_path / "set", "test/own.jsonl")
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    (folder / "test" / "linked.jsonl").symlink_to(tmp_path / "elsewhere" / "rows.jsonl")
    (folder / "test" / "up").symlink_to(folder)
    (folder / "test" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    assert dealt(folder) == {
        "train": ["train/more/rows.jsonl", "train/rows.jsonl"],
        "test": ["test/linked.jsonl", "test/own.jsonl"],
    }
    (tmp_path / "link").symlink_to(folder)
    assert list(found(tmp_path / "link").splits) == ["train", "test"]


def test_a_hub_id_is_no_file() -> None:
    assert find_files("some-user/some-data") is None
    assert find_files("some-data") is None


# ---------------------------------------------------------------------------------------------- cards


def card(folder: Path, configs: Any, **others: Any) -> Path:
    front = yaml.safe_dump({"license": "mit", **others, "configs": configs})
    return write(folder / "README.md", f"---\n{front}---\n\n# A data set\n\n---\n")


FILES = (
    "en/one.jsonl",
    "en/two.jsonl",
    "en/deep/three.jsonl",
    "de/one.jsonl",
    "held.jsonl",
    "set[1].jsonl",
    "set1.jsonl",
)


@pytest.mark.parametrize(
    ("data_files", "splits"),
    [
        ("en/one.jsonl", {"train": ["en/one.jsonl"]}),
        ("en/*", {"train": ["en/one.jsonl", "en/two.jsonl"]}),
        ("en/**", {"train": ["en/deep/three.jsonl", "en/one.jsonl", "en/two.jsonl"]}),
        ("**/one.jsonl", {"train": ["de/one.jsonl", "en/one.jsonl"]}),
        ("./de/*.jsonl", {"train": ["de/one.jsonl"]}),
        (["held.jsonl", "e?/t[vw]o.jsonl"], {"train": ["en/two.jsonl", "held.jsonl"]}),
        (
            [{"split": "train", "path": "*/*.jsonl"}, {"split": "mine", "path": ["held.jsonl", "he*"]}],
            {"train": ["de/one.jsonl", "en/one.jsonl", "en/two.jsonl"], "mine": ["held.jsonl"]},
        ),
        ([{"split": "test", "path": "held.jsonl"}], {"test": ["held.jsonl"]}),
    ],
)
@pytest.mark.parametrize("is_one_of_two", [False, True])
def test_the_files_of_a_card_are_followed(data_files: Any, splits: Dealt, is_one_of_two: bool, tmp_path: Path) -> None:
    make(tmp_path, *FILES)
    configs = [{"config_name": "other", "data_files": "set1.jsonl"}] if is_one_of_two else []
    card(tmp_path, [*configs, {"config_name": "default" if is_one_of_two else "any", "data_files": data_files}])
    assert dealt(tmp_path) == splits
    assert loaded_by_the_library(tmp_path) == splits
    left_out = set(FILES) - {name for its_names in splits.values() for name in its_names}
    assert set(names(tmp_path, found(tmp_path).left_out)) == left_out


def test_a_card_beats_the_names_of_files(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "test.jsonl", "data/train-00000-of-00001.jsonl")
    assert dealt(tmp_path) == {"train": ["data/train-00000-of-00001.jsonl"]}
    card(tmp_path, [{"config_name": "default", "data_files": [{"split": "train", "path": "test.jsonl"}]}])
    assert dealt(tmp_path) == loaded_by_the_library(tmp_path) == {"train": ["test.jsonl"]}


def test_the_config_called_default_is_taken(tmp_path: Path) -> None:
    make(tmp_path, *FILES)
    configs = [
        {"config_name": "de", "data_files": "de/*"},
        {"config_name": "en", "data_files": "en/*", "default": True},
    ]
    card(tmp_path, configs)
    assert dealt(tmp_path) == loaded_by_the_library(tmp_path) == {"train": ["en/one.jsonl", "en/two.jsonl"]}


def test_several_configs_without_a_default_are_named(tmp_path: Path) -> None:
    make(tmp_path, *FILES)
    card(tmp_path, [{"config_name": "de", "data_files": "de/*"}, {"config_name": "en", "data_files": "en/*"}])
    assert "has the configs de, en, and not one default" in message(tmp_path)
    with pytest.raises(ValueError, match="Config name is missing"):
        datasets.load_dataset(str(tmp_path))
    card(tmp_path, [{"config_name": "de", "default": True}, {"config_name": "en", "default": True}])
    assert "has the configs de, en, and not one default" in message(tmp_path)


def test_a_config_may_name_its_folder(tmp_path: Path) -> None:
    make(tmp_path, "de/train.jsonl", "de/test.jsonl", "en/train.jsonl")
    card(tmp_path, [{"config_name": "default", "data_dir": "de"}, {"config_name": "en", "data_dir": "en"}])
    assert dealt(tmp_path) == {"train": ["de/train.jsonl"], "test": ["de/test.jsonl"]}
    in_de = {"train": ["de/train.jsonl"], "test": ["de/test.jsonl"]}
    assert loaded_by_the_library(tmp_path) == in_de
    # The library looks for these outside of the config's folder at first, and finds none.
    card(tmp_path, [{"config_name": "default", "data_dir": "de", "data_files": "t*n.jsonl"}])
    assert dealt(tmp_path) == {"train": ["de/train.jsonl"]}


def test_shards_of_no_splits_name_are_dealt_by_words(tmp_path: Path) -> None:
    make(tmp_path, "data/my-train-00000-of-00001.jsonl", "data/my-test-00000-of-00001.jsonl")
    assert dealt(tmp_path) == {
        "train": ["data/my-train-00000-of-00001.jsonl"],
        "test": ["data/my-test-00000-of-00001.jsonl"],
    }


@pytest.mark.parametrize("text", ["# Plain\n", "---\nlicense: mit\n---\n", "---\nno end\n", "", "---\n- a list\n---\n"])
def test_a_card_without_configs_says_nothing_of_files(text: str, tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "test.jsonl")
    write(tmp_path / "README.md", text)
    assert dealt(tmp_path) == {"train": ["train.jsonl"], "test": ["test.jsonl"]}


def test_brackets_of_a_file_in_a_card_are_its_own(tmp_path: Path) -> None:
    make(tmp_path, *FILES)
    card(tmp_path, [{"config_name": "default", "data_files": "set[1].jsonl"}])
    assert dealt(tmp_path) == {"train": ["set[1].jsonl"]}
    (tmp_path / "set[1].jsonl").unlink()
    assert dealt(tmp_path) == {"train": ["set1.jsonl"]}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"data_files": "gone.jsonl"}, "data_files has 'gone.jsonl', and there is no such file that can be read"),
        ({"data_files": ["a.jsonl", "x/*"]}, "data_files has 'x/*', and there is no such file that can be read"),
        ({"data_files": "**.jsonl"}, "data_files has '**.jsonl', which is no file or pattern in its folder"),
        ({"data_files": "/tmp/*.jsonl"}, "data_files has '/tmp/*.jsonl', which is no file or pattern in its folder"),
        ({"data_files": "https://x.org/a.jsonl"}, "data_files has 'https://x.org/a.jsonl', and there is no such file"),
        ({"data_files": [{"split": "train"}]}, "data_files has None, which is no file or pattern in its folder"),
        ({"data_files": 5}, "data_files has 5, which is no file or pattern in its folder"),
        ({"data_files": ""}, "data_files has '', which is no file or pattern in its folder"),
        ({"data_files": "a.jsonl", "field": "data"}, "says field of its files, which is not followed"),
    ],
)
def test_what_a_card_asks_in_vain_is_refused(config: dict[str, Any], what: str, tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "data/.hidden.jsonl", "data/a.md")
    path = card(tmp_path, [{"config_name": "default", **config}])
    assert message(tmp_path).startswith(f"{path}{' ' if what.startswith('says') else ': '}{what}")


def test_a_card_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    path = write(tmp_path / "README.md", "---\nconfigs: [\n---\n")
    assert message(tmp_path).startswith(f"{path}: its front matter is not valid YAML")
    card(tmp_path, [{"data_files": "a.jsonl"}])
    assert message(tmp_path) == f"{path}: `configs` must be a list of objects with a config_name"
