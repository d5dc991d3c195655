"""A model attends document by document where that agrees with its own attention, and nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import are_logits_close, llama4_of_chunks, model_of, model_whose_rounding_grows, qwen2_moe
from models import VOCABULARY, tiny_model
from transformers import PreTrainedConfig

from fullft.attention import documents
from fullft.attention.choice import attend_by_document, choose_attention
from fullft.attention.documents import NAME


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("make", [qwen2_moe, llama4_of_chunks])
def test_window_in_the_mask_alone_is_kept(make: Callable[[int], PreTrainedConfig], packing: bool) -> None:
    """The negative control: a window that is as long as the sequence."""
    ids = torch.randint(1, VOCABULARY, (1, 40))
    inputs = {"input_ids": ids, "position_ids": torch.arange(40)[None] % (25 if packing else 40)}
    model = model_of(make(8))
    theirs = model(**inputs, use_cache=False).logits
    choose_attention(model, packing)
    assert torch.allclose(model(**inputs, use_cache=False).logits, theirs, atol=1e-5)
    without = model_of(make(40))
    without.load_state_dict(model.state_dict())
    assert not torch.allclose(without(**inputs, use_cache=False).logits, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", [False, True])
def test_attention_by_document_is_chosen_where_it_agrees(
    packing: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def implementation() -> str:
        model = tiny_model("llama", dtype)
        choose_attention(model, packing)
        return str(model.config._attn_implementation)

    assert implementation() == NAME
    original = documents.document_attention

    def differ(*arguments: Any) -> torch.Tensor:
        if isinstance(mistake, Exception):
            raise mistake
        return original(*arguments) * mistake

    monkeypatch.setattr(documents, "document_attention", differ)
    for mistake in (1.01 if dtype == torch.float32 else 1.5, float("nan"), ValueError("positions of three axes")):
        assert implementation() == "sdpa", mistake


def test_attention_is_chosen_although_rounding_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = documents.document_attention
    monkeypatch.setattr(documents, "document_attention", lambda *arguments: original(*arguments) * (1 + 2**-7))
    model = model_whose_rounding_grows()
    ids = torch.arange(1, 33)[None]
    theirs = model(ids, use_cache=False).logits.float()
    choose_attention(model, joins_rows=True)
    assert model.config._attn_implementation == NAME
    assert not are_logits_close(model(ids, use_cache=False).logits.float(), theirs)  # else these could be compared


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_generation_stays_the_same(family: str) -> None:
    model = tiny_model(family, torch.float32).eval()
    prompts = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(prompts, **options)
    assert attend_by_document(model)
    assert torch.equal(model.generate(prompts, **options), theirs)
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_saved_config_names_no_attention(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    attend_by_document(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_soft_capped_scores_keep_their_own_attention() -> None:
    model = tiny_model("gemma2")
    model.set_attn_implementation("eager")  # the default since transformers 5.23; before, it was torch's kernel
    assert not attend_by_document(model)
    assert model.config._attn_implementation != NAME
