"""Rows: every kind of file gives its rows as they stand there, and what cannot be read is named with its line."""

import csv
import errno
import gzip
import json
import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from models import make_config

from fullft.config.parse import parse_config
from fullft.data.sources import load_held_out_rows, load_rows
from fullft.errors import DataError, DiskError

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(6)]
LINES = [json.dumps(row) for row in ROWS]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    return load_rows(make_config(dataset=str(path), **options)).to_list()


def message(path: Path | str, **options: Any) -> str:
    """Load what cannot be loaded, and give the error's text."""
    with pytest.raises(DataError) as caught:
        load(path, **options)
    assert caught.value.exit_code == 3
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- kinds of files


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "b.jsonl", "\n".join(LINES))
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(ROWS)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "d.parquet")
    write(tmp_path / "E.JSONL", "\n".join(LINES))
    for name in ("a.json", "b.jsonl", "c.csv", "d.parquet", "E.JSONL"):
        assert load(tmp_path / name) == ROWS, name


def test_json_is_read_whatever_the_ending_says(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.json", "\n".join(LINES))) == ROWS
    assert load(write(tmp_path / "b.jsonl", json.dumps(ROWS))) == ROWS


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".txt"])
def test_byte_order_marks_and_windows_lines_change_nothing(ending: str, tmp_path: Path) -> None:
    content = {
        ".json": json.dumps(ROWS, indent=1),
        ".jsonl": "\n".join(LINES),
        ".csv": "instruction,output\nq,a\nr,b\n",
        ".txt": "one\ntwo\n",
    }[ending]
    plain = load(write(tmp_path / f"plain{ending}", content))
    windows = write(tmp_path / f"windows{ending}", b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert load(windows) == plain
    assert plain in (ROWS, [{"text": "one\ntwo\n"}], [{"instruction": x, "output": y} for x, y in ("qa", "rb")])


def test_blank_lines_of_jsonl_are_no_rows(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.jsonl", f"\n{LINES[0]}\n\n  \n{LINES[1]}\n\n")) == ROWS[:2]


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    cells = ["007", "NA", "", "null", "1e5", "True", "2020-01-01", "nan", "a,b", 'say "x"', "two\nlines", " padded "]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "number"])
        writer.writerows([[cell, "1"] for cell in cells])
    assert load(tmp_path / "a.csv") == [{"text": cell, "number": "1"} for cell in cells]


def test_the_nameless_index_column_of_csv_is_dropped(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.csv", ",text\n0,x\n1,y\n")) == [{"text": "x"}, {"text": "y"}]


def test_json_strings_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    rows = [{"instruction": "007", "output": "1e5"}, {"instruction": "NA", "output": "null"}]
    assert load(write(tmp_path / "a.json", "\n " + json.dumps(rows, indent=2))) == rows


def test_a_txt_file_is_one_row(tmp_path: Path) -> None:
    text = "one\n\n\ntwo 😀\n" * 3
    assert load(write(tmp_path / "a.txt", text)) == [{"text": text}]


def test_a_folder_is_its_visible_files_in_order(tmp_path: Path) -> None:
    for name, row in (("b.jsonl", 1), ("a.json", 0), ("sub/c.jsonl", 2), (".hidden/d.jsonl", 3), (".e.jsonl", 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, LINES[row] if name.endswith("jsonl") else f"[{LINES[row]}]")
    write(tmp_path / "README.md", "not data")
    assert load(tmp_path) == ROWS[:3]


def test_txt_files_of_a_folder_are_single_rows(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.txt", f"{name}\n{name}\n")
    assert load(tmp_path) == [{"text": "a\na\n"}, {"text": "b\nb\n"}]


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINES[0])
    write(tmp_path / "b.csv", "text\nx\n")
    assert "files of one kind; found: csv, json" in message(tmp_path)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "not data")
    assert "found: none" in message(tmp_path)


@pytest.mark.parametrize("late", [{"input": "i"}, {"input": "i", "topic": "t"}])
@pytest.mark.parametrize("early", [{}, {"input": None}], ids=["missing", "null"])
def test_a_key_first_seen_late_is_read(early: dict[str, Any], late: dict[str, Any], tmp_path: Path) -> None:
    line = json.dumps({"instruction": "q", "output": "x" * 100_000, **early}) + "\n"
    last = {"instruction": "q", "output": "a", **late}
    rows = load(write(tmp_path / "a.jsonl", line * 120 + json.dumps(last)))
    assert (len(rows), rows[-1]) == (121, last)
    assert rows[0]["input"] is None


# ---------------------------------------------------------------------------------------------- splits and columns


@pytest.mark.parametrize(
    ("split", "indices"), [("train", range(6)), ("train[4:]", (4, 5)), ("train[:2]+train[-1:]", (0, 1, 5))]
)
def test_a_split_selects_rows(split: str, indices: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(LINES))
    assert load(path, dataset_split=split) == [ROWS[i] for i in indices]


def test_an_unknown_split_names_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(LINES))
    text = message(path, dataset_split="test")
    assert '"test"' in text and "train" in text
    assert "train[x]" in message(path, dataset_split="train[x]")
    assert "has no rows" in message(path, dataset_split="train[10:]")


def test_columns_are_renamed_and_others_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "1", "a": "2", "id": "3"}\n')
    assert load(path, columns={"instruction": "q", "output": "a"}) == [{"instruction": "1", "output": "2", "id": "3"}]
    assert load(path, columns={"text": "a", "output": "q"}) == [{"output": "1", "text": "2", "id": "3"}]


def test_two_columns_can_swap_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES[0])
    swapped = load(path, columns={"instruction": "output", "output": "instruction"})
    assert swapped == [{"instruction": "a0", "output": "q0"}]


def test_a_column_whose_name_is_taken_gives_way(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"instruction": "x", "output": "y", "better": "z"}\n')
    rows = load_rows(make_config(dataset=str(path), columns={"output": "better"}))
    assert rows.column_names == ["instruction", "output"]
    assert rows[0] == {"instruction": "x", "output": "z"}


def test_a_missing_column_is_named_with_those_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES[0])
    assert "no column answer; it has instruction, output" in message(path, columns={"output": "answer"})
    text = message(path, dataset_text_field="body")
    assert "--dataset_text_field body" in text and "instruction, output" in text
    assert "given two names" in message(path, columns={"input": "output", "text": "output"})


def test_a_text_field_turns_rows_into_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"instruction": "x", "output": "y", "body": "z", "text": "t"}\n')
    assert load(path, dataset_text_field="body") == [{"text": "z"}]
    assert load(path, dataset_text_field="text")[0]["instruction"] == "x"


# ---------------------------------------------------------------------------------------------- what cannot be read


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing"), "nothing.jsonl", "./nothing", "a/b/c"):
        assert "there is no data file or folder" in message(name)


def test_an_unknown_ending_names_the_known_ones(tmp_path: Path) -> None:
    text = message(write(tmp_path / "a.xlsx", "x"))
    assert ".xlsx is none of .json, .jsonl, .ndjson, .csv, .tsv, .txt, .parquet" in text
    assert "no ending" in message(write(tmp_path / "data", "x"))


def test_a_hub_id_offline_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []  # retries would take half a minute
    monkeypatch.setattr(socket.socket, "connect", lambda *_: asked.append(_))
    for name in ("some-user/some-data", "some-data"):
        assert "--dataset <file.jsonl>" in message(name)
    assert asked == []


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet", ".txt"])
def test_an_empty_file_is_named(ending: str, tmp_path: Path) -> None:
    assert message(write(tmp_path / f"a{ending}", "")) == f"data file {tmp_path / f'a{ending}'} is empty"


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n \n"), ("a.csv", "instruction,output\n"), ("b.json", "{}")]
)
def test_a_file_without_rows_is_named(name: str, content: str, tmp_path: Path) -> None:
    assert "has no rows" in message(write(tmp_path / name, content))


def test_a_broken_json_line_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        path = write(tmp_path / name, f"{LINES[0]}\n\n{LINES[1][:-1]}\n{LINES[2]}\n")
        assert message(path).startswith(f"{path}, line 3: not valid JSON")
        assert message(path, dataset_split="train[:1]").startswith(f"{path}, line 3: not valid JSON")


def test_a_broken_json_array_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", f"[\n{LINES[0]},\n{LINES[1].replace(':', '')},\n{LINES[2]}\n]")
    assert message(path).startswith(f"{path}, line 3: not valid JSON")


def test_the_broken_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINES[0])
    write(tmp_path / "b.jsonl", f"{LINES[0]}\n{{")
    assert message(tmp_path).startswith(f"{tmp_path / 'b.jsonl'}, line 2")


@pytest.mark.parametrize("line", ['["a"]', '"a"', "5"])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"{LINES[0]}\n{line}\n")
    assert message(path) == f"{path}, line 2: not a JSON object"


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f'{LINES[0]}\n{{"instruction": "\\ud83d", "output": "a"}}\n')
    assert message(path).startswith(f"{path}, line 2")


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_undecodable_bytes_name_their_line(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, "text\né\n".encode("latin-1"))
    assert message(path).startswith(f"{path}, line 2: not UTF-8 text")


def test_rows_inside_an_object_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}, indent=1))
    assert "holds its rows as 'data'" in message(path)
    # A single row of messages has the same shape and is fine.
    row = {"messages": [{"role": "user", "content": "x"}]}
    assert load(write(tmp_path / "b.json", json.dumps(row))) == [row]


def test_nothing_but_our_message_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message(write(tmp_path / "a.jsonl", "{"))
    assert caplog.records == []


def test_a_damaged_packed_file_is_named(tmp_path: Path) -> None:
    packed = gzip.compress("\n".join(LINES * 100).encode())
    for content in (packed[:-20], packed[:50] + b"xxxx" + packed[54:], b"no gzip", packed[:5]):
        path = write(tmp_path / "a.jsonl.gz", content)
        assert str(path) in message(path)
        assert message(path).startswith((f"data file {path} is damaged", f"cannot read {path}"))
    assert load(write(tmp_path / "good.jsonl.gz", packed)) == ROWS * 100


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for name in ("a.jsonl", "a.parquet"):
        assert "`git lfs pull`" in message(write(tmp_path / name, pointer))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move_cache(folder: Path) -> None:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)

    path = write(tmp_path / "a.jsonl", "\n".join(LINES))
    no_folder = write(tmp_path / "cache", "a file")
    move_cache(no_folder)
    with pytest.raises(DiskError) as caught:
        load(path)
    assert caught.value.exit_code == 6
    assert f"cache {no_folder}: " in str(caught.value) or f"libraries, {no_folder}: " in str(caught.value)
    assert "HF_DATASETS_CACHE" in str(caught.value) and str(path) not in str(caught.value)
    move_cache(tmp_path / "other")
    assert load(path) == ROWS
    assert (tmp_path / "other").is_dir()

    # Folders can be made there, and no files.
    opens = Path.open

    def open_or_fail(file: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if file.suffix == ".partial":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opens(file, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", open_or_fail)
    move_cache(tmp_path / "third")
    with pytest.raises(DiskError, match=f"{tmp_path / 'third'}: .*\n.*HF_DATASETS_CACHE"):
        load(path)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(LINES))
    first = load_rows(make_config(dataset=str(path)))
    assert load_rows(make_config(dataset=str(path))).key == first.key
    write(path, "\n".join(LINES[::-1]))
    assert load(path) == ROWS[::-1]
    assert load_rows(make_config(dataset=str(path))).key != first.key


# ---------------------------------------------------------------------------------------------- names of files


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("name", ["set[1]", "*", "set?", "{a,set1}", "my set", "é😀"])
def test_the_file_that_is_named_is_read(name: str, ending: str, tmp_path: Path) -> None:
    def make(path: Path, row: dict[str, str]) -> None:
        path.parent.mkdir(exist_ok=True)
        if ending == ".parquet":
            Dataset.from_list([row]).to_parquet(path)
        else:
            write(path, json.dumps(row) if ending == ".jsonl" else f"instruction,output\n{','.join(row.values())}\n")

    for other in ("set1", "a", "setx"):
        make(tmp_path / f"{other}{ending}", ROWS[0])
        make(tmp_path / other / f"rows{ending}", ROWS[0])
    make(tmp_path / f"{name}{ending}", ROWS[1])
    make(tmp_path / name / f"{name}{ending}", ROWS[2])
    assert load(tmp_path / f"{name}{ending}") == [ROWS[1]]
    assert load(tmp_path / name) == [ROWS[2]]
    assert load(tmp_path / f"set1{ending}") == [ROWS[0]]


def test_home_links_and_relative_paths_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", LINES[0])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "sub")
    for name in ("~/a.jsonl", "../a.jsonl", "./link.jsonl", "link.jsonl", "~/sub", "."):
        config = parse_config(["--model=gpt2", f"--dataset={name}", f"--eval_dataset={name}", "--preview=1"])
        assert load_rows(config).to_list() == ROWS[:1], name
        held_out = load_held_out_rows(config)
        assert held_out is not None and held_out.to_list() == ROWS[:1], name


def test_a_folder_of_packed_and_plain_files_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINES[0])
    write(tmp_path / "b.jsonl.gz", gzip.compress(LINES[1].encode()))
    write(tmp_path / "c.ndjson", LINES[2])
    write(tmp_path / "d.xlsx", "no data")
    rows = load_rows(make_config(dataset=str(tmp_path)))
    assert rows.to_list() == ROWS[:3]
    assert [rows.place(i) for i in range(3)] == [
        f"{tmp_path / name}, line 1" for name in ("a.jsonl", "b.jsonl.gz", "c.ndjson")
    ]
    assert rows.left_out == (str(tmp_path / "d.xlsx"),)


def test_a_saved_data_set_is_loaded(tmp_path: Path) -> None:
    rows = [{**row, "messages": [{"role": "user", "content": "x", "name": None}]} for row in ROWS]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    loaded = load_rows(make_config(dataset=str(tmp_path / "set"), dataset_split="train[1:]"))
    assert loaded[0] == {**ROWS[1], "messages": [{"role": "user", "content": "x"}]}
    assert loaded.place(0) == f"{tmp_path / 'set'}, split train[1:], row 1"
    assert '"test"' in message(tmp_path / "set", dataset_split="test")
    (tmp_path / "set" / "state.json").write_text("{")
    assert message(tmp_path / "set").startswith(f"cannot read the saved data set {tmp_path / 'set'}: ")
