"""Rows of the tests of data, and what becomes of them by plain tokenizer calls."""

import copy
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from models import make_config
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from fullft.data.load import Data, load_data

IGNORED = -100
EOS = 0  # <|endoftext|> of the demo's tokenizer; bos and pad, too
Row = dict[str, Any]


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(tmp_path: Path, rows: list[Row], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Data:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return load_data(make_config(**{"dataset": str(path), "val_size": 0, **options}), tokenizer)


def pairs(data: Data) -> list[tuple[list[int], list[int]]]:
    """Return the token ids and labels of all training rows."""
    return [(row["input_ids"], row["labels"]) for row in data.train.rows]


def begins_by_bytes(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokenise text and find the character that each token begins in by counting its bytes, not by offsets."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    # A byte-level token is written with one character per byte.
    ends = accumulate(len(token) for token in tokenizer.convert_ids_to_tokens(ids))
    return ids, [len(text.encode()[:end].decode(errors="ignore")) for end in [0, *ends][:-1]]


def expected_pair(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    ids, begins = begins_by_bytes(prompt + response, tokenizer)
    labels = [token if begin >= len(prompt) else IGNORED for token, begin in zip(ids, begins, strict=True)]
    return [*ids, EOS], [*labels, EOS]


def without_first(labels: list[int]) -> list[int]:
    """Nothing predicts a sequence's first token."""
    return [IGNORED, *labels[1:]]


def adding(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Make a tokenizer that adds special tokens by itself."""
    changed = copy.deepcopy(tokenizer)
    tokens = [(token, changed.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_start|>")]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    return changed


def completions(*texts: tuple[str, str]) -> list[Row]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]


def numbered(count: int) -> list[Row]:
    return completions(*[("n ", str(i)) for i in range(count)])


def count_calls(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the number of texts of every call of the tokenizer."""
    calls: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: PreTrainedTokenizerBase, text: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    return calls
