"""Data files of text: rows as they stand there, and the line of what is broken.

The right rows are worked out by hand, or by the `json` module.
"""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fullft.data.files import records
from fullft.errors import DataError

Row = dict[str, Any]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path: Path) -> list[Row]:
    return [json.loads(each.text) for each in records(path)]


def lines(path: Path) -> list[int]:
    return [each.line for each in records(path)]


def message(path: Path) -> str:
    """Read what cannot be read, and return the error's text behind the file's name."""
    with pytest.raises(DataError) as caught:
        list(records(path))
    assert str(caught.value).startswith((f"{path}, ", f"data file {path} "))
    return str(caught.value).replace(str(path), "").removeprefix(", ")


AB = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]

# ---------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    ("content", "line", "cells"),
    [
        ("a,b\n1,2\n3\n", 3, 1),
        ("a,b\n1,2,3\n3,4\n", 2, 3),
        ("a,b\n\n1,2\n\n3,4,,5\n", 5, 4),
        ('a,b\n"1\n1",2\n3,4,5\n', 4, 3),  # behind a cell of two lines
        ("sep=;\na;b\n1;2\n3;4;5\n", 4, 3),
        ("a\tb\n1\t2\n3\n", 3, 1),
        ("a,b\r1,2\r3\r", 3, 1),
    ],
)
def test_ragged_csv_rows_are_refused(content: str, line: int, cells: int, tmp_path: Path) -> None:
    said = f"line {line}: {cells} cell{'s' if cells > 1 else ''}, and the header has 2"
    assert message(write(tmp_path / "a.csv", content)).startswith(said)


@pytest.mark.parametrize(
    "content",
    [
        "a,b\n1,2\n3,4\n",
        "a,b,,\n1,2,,\n3,4,,\n",
        "a,b\n1,2,,\n3,4,\n",
        "a,b,\n1,2\n3,4\n",
        "a;b\n1;2\n3;4\n",
        "a\tb\n1\t2\n3\t4\n",
        "sep=;\na;b\n1;2\n3;4\n",
        "SEP=,\r\na,b\r\n1,2\r\n3,4",
        "sep=|\na|b\n1|2\n3|4\n",
        "\na,b\n1,2\n3,4\n",
        "\n  \na;b\n1;2\n\n3;4\n\n",
        ",,\na,b,\n1,2,\n3,4,\n",
        "\nsep=;\na;b\n1;2\n3;4\n",
        "a,b\r1,2\r3,4\r",
        "a;b\r1;2\r3;4",
        "\ufeffa,b\r\n1,2\r\n3,4\r\n",
        "\ufeffsep=;\r\na;b\r\n1;2\r\n3;4\r\n",
        '"a","b"\n"1","2"\n"3","4"\n',
        '\ufeff"a";"b"\n"1";"2"\n"3";"4"\n',
    ],
)
def test_every_way_to_write_csv_gives_its_rows(content: str, tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.csv", content)) == AB


def test_tsv_is_split_at_tabs_first(tmp_path: Path) -> None:
    content = "a, x\tb, y\n1, 1\t2, 2\n"
    assert rows(write(tmp_path / "a.tsv", content)) == [{"a, x": "1, 1", "b, y": "2, 2"}]
    assert rows(write(tmp_path / "b.tsv", "a,b\n1,2\n")) == [{"a": "1", "b": "2"}]
    # The same text in a .csv has three columns.
    assert list(rows(write(tmp_path / "a.csv", content))[0]) == ["a", " x\tb", " y"]


def test_quotes_hold_delimiters_line_ends_and_quotes(tmp_path: Path) -> None:
    content = 'a,b\r\n"x, y","one\r\ntwo\nthree\rfour"\r\n"say ""hi""",""""\r\n'
    expected = [{"a": "x, y", "b": "one\r\ntwo\nthree\rfour"}, {"a": 'say "hi"', "b": '"'}]
    path = write(tmp_path / "a.csv", content)
    assert rows(path) == expected
    assert lines(path) == [2, 6]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_csv_writers_write_comes_back(delimiter: str, end: str, tmp_path: Path) -> None:
    cells = ["007", "NA", "", " x ", "a,b;c\td", 'q"q', "two\nlines", "two\r\nlines", "é😀\u2028x", "sep=;", "'"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
        writer.writerow(["text", "number"])
        writer.writerows([[cell, str(number)] for number, cell in enumerate(cells)])
    assert rows(tmp_path / "a.csv") == [{"text": cell, "number": str(number)} for number, cell in enumerate(cells)]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('a,b\n1,2\n"3,4\n5,6\n', 3),
        ('a,b\n"1",2\n"3"x,4\n', 3),
        ('a,b\r1,2\r"3,4\r5,6\r', 3),
        ('sep=;\na;b\n"1;2\n', 3),
    ],
)
def test_a_quote_left_open_names_its_line(content: str, line: int, tmp_path: Path) -> None:
    assert message(write(tmp_path / "a.csv", content)).startswith(f"line {line}: not valid CSV")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    assert message(write(tmp_path / "a.csv", "\na,b,a\n1,2,3\n")) == "line 2: two columns are called a"
    assert rows(write(tmp_path / "b.csv", ",a,,b\n0,1,9,2\n")) == [{"a": "1", "b": "2"}]  # without names: no columns


@pytest.mark.parametrize("content", ["a,b\n", "a,b", "\n\na,b\r\n\r\n", "sep=;\na;b\n", "\n\n", "sep=;\n"])
def test_a_header_alone_has_no_rows(content: str, tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.csv", content)) == []


def test_one_column_of_csv_keeps_its_commas_in_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text\n"a, b"\n\nc\n"d\n"\n')
    assert rows(path) == [{"text": "a, b"}, {"text": "c"}, {"text": "d\n"}]
    assert lines(path) == [2, 4, 5]
    assert message(write(tmp_path / "b.csv", "text\na, b\n")).startswith("line 2: 2 cells, and the header has 1")


def test_undecodable_bytes_of_an_old_mac_name_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\r1,2\ré,4\r".encode("latin-1"))
    assert message(path).startswith("line 3: not UTF-8 text")


# ---------------------------------------------------------------------------------------------- compression

COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXTS = {
    ".jsonl": '{"a": "1", "b": "2"}\n{"a": "3", "b": "4"}\n',
    ".ndjson": '{"a": "1", "b": "2"}\n{"a": "3", "b": "4"}\n',
    ".json": json.dumps(AB, indent=2),
    ".csv": "\ufeffa,b\r\n1,2\r\n3,4\r\n",
    ".tsv": "a\tb\n1\t2\n3\t4\n",
}


@pytest.mark.parametrize("packed", ["", *COMPRESS])
@pytest.mark.parametrize("ending", TEXTS)
def test_packed_files_give_the_same_rows(ending: str, packed: str, tmp_path: Path) -> None:
    pack = COMPRESS.get(packed, bytes)
    assert rows(write(tmp_path / f"a{ending}{packed}", pack(TEXTS[ending].encode()))) == AB
    assert rows(write(tmp_path / f"B{ending.upper()}{packed.upper()}", pack(TEXTS[ending].encode()))) == AB


def test_a_packed_text_is_one_document(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.txt.gz", gzip.compress(b"one\r\ntwo\rthree\n"))) == [{"text": "one\ntwo\nthree\n"}]


def test_a_line_inside_a_packed_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": 1}\n\n{"a": }\n'))
    assert message(path).startswith("line 3: not valid JSON (Expecting value, column 7)")


# ---------------------------------------------------------------------------------------------- JSON


def test_json_values_survive_as_they_stand(tmp_path: Path) -> None:
    values: list[Any] = [
        *("2020-01-01", "2020-01-01T00:00:00Z", "007", "1e5", "true", "null", "NaN", "", " x ", "\u2028\x85\x0b"),
        *(0.1234567890123, 10**20, -(2**63) - 1, 1e-300, 5, 5.0, True, None, [], {}, [[]], [None]),
        {"arguments": {"city": "Oslo", "unit": None, "deep": [{"x": None}, 0.1, 10**20, {"y": 1.0}]}},
    ]
    written = [{"value": value, "id": number} for number, value in enumerate(values)]
    for name, text in (
        ("a.jsonl", "\n".join(map(json.dumps, written))),
        ("b.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in written)),
        ("c.json", json.dumps(written)),
        ("d.json", json.dumps(written, indent="\t", ensure_ascii=False)),
    ):
        read = rows(write(tmp_path / name, text))
        assert json.dumps(read) == json.dumps(written), name  # which tells 5 from 5.0 and True


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_lines_may_end_as_anywhere(end: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"a": "\\r\\n"}}{end}{end} \t{{"a": "é\u2028"}} {end}')
    assert rows(path) == [{"a": "\r\n"}, {"a": "é\u2028"}]
    assert lines(path) == [1, 3]
    assert message(write(tmp_path / "b.jsonl", f'{{"a": 1}}{end}{end}{{"a"}}{end}')).startswith(
        "line 3: not valid JSON"
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' is given twice"),
        ('{"a": {"x": [{"y": 1, "y": 2}]}}', "the key 'y' is given twice"),
        ('{"a": 1} {"a": 2}', "not valid JSON (Extra data, column "),
        ('{"a": 1},', "not valid JSON (Extra data, column 9)"),
        ('{"a": 1', "not valid JSON"),
        ("null", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": ' + "[" * 100_000 + "}", "maximum recursion depth"),
        ('{"a": "\\udc00 \\ud83d"}', "half of a surrogate pair is no character"),
    ],
)
def test_a_broken_row_is_named_at_its_line(line: str, what: str, tmp_path: Path) -> None:
    good = '{"a": "\\ud83d\\ude00"}'
    assert rows(write(tmp_path / "good.jsonl", good)) == [{"a": "😀"}]
    assert message(write(tmp_path / "a.jsonl", f"{good}\n\n{line}\n{good}\n")).startswith(f"line 3: {what}")
    if "JSON (" not in what and what != "not valid JSON":  # syntax is another in an array
        assert "line 4: " in message(write(tmp_path / "a.json", f"[\n{good},\n\n{line}\n]"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[\n{"a": 1}\n{"a": 2}\n]', "line 3: not valid JSON (Expecting ',' delimiter, column 1)"),
        ('[\n{"a": 1},\n]', "line 3: not valid JSON (Expecting value, column 1)"),
        ('[\n{"a": 1}\n]\nx', "line 4: not valid JSON (Extra data, column 1)"),
        ('[\n{"a": 1}\n', "line 3: not valid JSON (Expecting ',' delimiter, column 1)"),
        ('[{"a": 1},\n\n  5]', "line 3: not a JSON object"),
        ('\n{\n"a": 1\n}\n\n {"a": 2}\n', "line 6: not valid JSON (Extra data, column 2)"),
        ('\n{\n"a": 1,\n}\n', "line 4: not valid JSON (Expecting property name enclosed in double quotes, column 1)"),
    ],
)
def test_a_broken_document_names_its_line(text: str, where: str, tmp_path: Path) -> None:
    assert message(write(tmp_path / "a.json", text)) == where


def test_entries_of_an_array_have_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n[ {"a": 1}, {"a":\n2}\n,\n\n{"a": 3}, "x"]\n')
    assert [(each.line, each.columns) for each in records(path)] == [
        (2, ("a",)),
        (2, ("a",)),
        (6, ("a",)),
        (6, ("text",)),
    ]
    assert rows(write(tmp_path / "empty.json", " [ ] ")) == []
