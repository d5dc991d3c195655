"""What the user is told about the data."""

from pathlib import Path

from rows import IGNORED, completions, expected_pair, load
from transformers import PreTrainedTokenizerBase


def test_the_description_counts_and_shows_what_is_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(tmp_path, completions(("the prompt ", "the response")), tokenizer)
    ids, labels = expected_pair("the prompt ", "the response", tokenizer)
    assert f"1 row, {len(ids)} tokens, {1 - labels.count(IGNORED) / len(ids):.0%} trained" in data.description
    shown = data.description.splitlines()[-1]
    assert shown.endswith("<|endoftext|>]") and "the prompt" in shown.split("[")[-2]
    assert data.largest_token_id == max(ids)
    assert data.longest == len(ids)
