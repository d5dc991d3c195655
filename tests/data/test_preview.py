"""The preview: rows as they are trained on, with their places, before any weight is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_lines import MODEL, problems_of
from datasets import Dataset
from rows import EOS, IGNORED, begins_by_bytes, completions, expected_pair, without_first, write_rows
from transformers import PreTrainedTokenizerBase

from fullft.config.parse import parse_config
from fullft.data.preview import show_preview
from fullft.errors import DataError, ModelError

Row = dict[str, Any]


def preview(capsys: pytest.CaptureFixture[str], dataset: Path, count: int, *words: str) -> str:
    show_preview(parse_config([f"--dataset={dataset}", f"--preview={count}", *words]))
    return capsys.readouterr().out


def preview_json(capsys: pytest.CaptureFixture[str], dataset: Path, count: int, *words: str) -> list[Row]:
    return [json.loads(line) for line in preview(capsys, dataset, count, "--json", *words).splitlines()]


def expected(source: str, ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Row:
    tokens = [tokenizer.decode([token]) for token in ids]
    assert len(tokens) == len(ids)
    return {
        "source": source,
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "input_ids": ids,
        "labels": without_first(labels),
    }


ROWS = [("Say one:", " one"), ("Say é 😀:", " é 😀"), ("nothing", ""), ("Say two:", " two\n\ntwo")]


def test_json_gives_what_is_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", completions(*ROWS))
    pairs = [(line, expected_pair(*ROWS[line - 1], tokenizer)) for line in (1, 2, 4)]  # line 3 has nothing to learn
    all_rows = [expected(f"{path}, line {line}", *pair, tokenizer) for line, pair in pairs]
    for count in (1, 2, 3, 100):
        assert preview_json(capsys, path, count) == all_rows[:count]
    learned = [label for label in all_rows[0]["labels"] if label != IGNORED]
    assert tokenizer.decode(learned) == " one<|endoftext|>"


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved"])
def test_the_source_is_the_rows_own(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    path, table = (
        tmp_path / f"rows.{kind}",
        Dataset.from_list([{"prompt": "a ", "completion": str(i)} for i in range(3)]),
    )
    if kind == "csv":
        path.write_text('prompt,completion\n"a ","0"\n\n"a ","1"\n"a ",2\n')
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(str(path))
    found = preview_json(capsys, path, 9, "--dataset_split=train[1:]")
    places = ["line 4", "line 5"] if kind == "csv" else ["split train[1:], row 1", "split train[1:], row 2"]
    assert [row["source"] for row in found] == [f"{path}, {place}" for place in places]
    assert [row["input_ids"] for row in found] == [expected_pair("a ", str(i), tokenizer)[0] for i in (1, 2)]


def test_each_piece_of_a_text_is_one_object(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["The quick brown fox jumps over the lazy dog. " * 3, "short"]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    pieces = []
    for line, text in enumerate(texts, start=1):
        ids = [*begins_by_bytes(text, tokenizer)[0], EOS]
        for start in range(0, len(ids), 16):
            piece = ids[start : start + 16]
            pieces.append(expected(f"{path}, line {line}", piece, piece, tokenizer))
    assert len(pieces) > 3
    assert preview_json(capsys, path, 100, "--max_length=16") == pieces
    assert preview_json(capsys, path, 2, "--max_length=16") == pieces[:2]


def test_each_turn_of_a_split_conversation_is_one_object(
    tmp_path: Path, model_folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    # Earlier turns of the assistant become shorter, as in Qwen3, which drops their reasoning.
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|im_start|>assistant\n"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.suffix not in (".safetensors", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    turns = [
        ("user", "Hello"),
        ("assistant", "<think>why</think>first answer"),
        ("user", "And?"),
        ("assistant", "second answer"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
    found = preview_json(capsys, path, 5, f"--model={folder}")
    assert [row["source"] for row in found] == [f"{path}, line 1"] * 2
    for row, until, answer in zip(found, (2, 4), ("<think>why</think>first answer", "second answer"), strict=True):
        text = tokenizer.apply_chat_template(messages[:until], chat_template=template, tokenize=False)
        assert tokenizer.decode(row["input_ids"]).startswith(text.rstrip())
        learned = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert learned.startswith(answer)


def test_no_weights_are_needed(
    tmp_path: Path, model_folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", completions(("a ", "b")))
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (row,) = preview_json(capsys, path, 1, f"--model={folder}")
    assert row["input_ids"] == expected_pair("a ", "b", tokenizer)[0]
    assert not (Path("full-ft-bare")).exists()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError) as caught:
        preview(capsys, path, 1, f"--model={folder}")
    assert caught.value.exit_code == 4 and str(folder) in str(caught.value)


def test_text_marks_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "id": 5} for row in completions(*ROWS)])
    shown = preview(capsys, path, 3).splitlines()
    assert shown[:3] == [
        "3 of 3 rows as they are trained on; [what is learned] stands in brackets",
        "of 4 rows read: 1 dropped (nothing to learn), 0 cut at 256",
        "columns that nothing reads: id",
    ]
    text = "\n".join(shown)
    assert "Say one:[ one<|endoftext|>]" in text and "Say é 😀:[ é 😀<|endoftext|>]" in text
    assert "Say two:[ two\n\ntwo<|endoftext|>]" in text  # in full, with its line ends
    assert f"--- {path}, line 4: " in text and f"{path}, line 3" not in text
    cut = preview(capsys, path, 1, "--max_length=4")
    assert ": 4 tokens, " in cut and ", cut at 4" in cut


def test_a_broken_row_ends_the_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": None}]
    )
    with pytest.raises(DataError) as caught:
        preview(capsys, path, 1)
    assert str(caught.value) == f"{path}, line 2: output is missing, expected text"
    assert caught.value.exit_code == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--preview=2", "--plan"], "plan and preview are two questions: ask one at a time"),
        (["--json"], "--json does nothing without --plan or --preview: add it"),
        (["--preview=-1"], "preview"),
        (["--preview=1.5"], "preview"),
        (["--preview=1", "--gpu_hour_price=2"], "--gpu_hour_price does nothing without --plan: add it"),
    ],
)
def test_wrong_combinations_are_refused(
    words: list[str], answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert any(answer in line for line in problems_of(*MODEL, *words))


def test_a_preview_minds_no_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", completions(("a ", "b")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")
    words = [f"--output_dir={tmp_path / 'run'}"]
    assert len(preview_json(capsys, path, 1, *words)) == 1
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["log.jsonl"]
    assert any("is not empty" in line for line in problems_of(f"--dataset={path}", *words))
