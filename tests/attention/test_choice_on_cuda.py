"""On CUDA packed rows are attended to by our operator where that agrees, and one line says why where it does not."""

from typing import Any

import pytest
import torch
from families import model_of, model_whose_rounding_grows, of_experts
from models import VOCABULARY, tiny_model

from fullft.attention import packed
from fullft.attention.choice import attend_packed, choose_attention
from fullft.model.checks import check_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "own"), [("llama", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager")])
def test_packed_rows_are_attended_to_by_document(
    family: str, own: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(family, dtype).cuda()
    choose_attention(model, joins_rows=False)
    assert model.config._attn_implementation == own
    choose_attention(model, joins_rows=True)
    assert model.config._attn_implementation == packed.NAME
    check_model(model, VOCABULARY - 1, 64, joins_rows=True)
    assert capsys.readouterr().out == ""


def test_attention_is_chosen_although_rounding_grows() -> None:
    model = model_whose_rounding_grows().cuda()
    choose_attention(model, joins_rows=True)
    assert model.config._attn_implementation == packed.NAME


@pytest.mark.parametrize("mistake", [1.5, float("nan"), ValueError("positions of three axes\nand a trace")])
def test_attention_that_differs_is_named_once(
    mistake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = packed.packed_attention

    def differ(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(mistake, Exception):
            raise mistake
        result, logsumexp = original(*arguments)
        return result * mistake, logsumexp

    monkeypatch.setattr(packed, "packed_attention", differ)
    model = tiny_model("llama", torch.bfloat16).cuda()
    choose_attention(model, joins_rows=True)
    assert model.config._attn_implementation == "sdpa"
    reason = "positions of three axes" if isinstance(mistake, Exception) else "ours gives another result"
    mask = "a mask of length² in each layer"
    assert capsys.readouterr().out == (
        f"warning: LlamaForCausalLM attends to rows of several documents with {mask}: {reason}\n"
    )


def test_family_with_sinks_keeps_its_attention(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(of_experts("gpt_oss")).cuda()
    own = model.config._attn_implementation
    assert not attend_packed(model, "cuda")
    choose_attention(model, joins_rows=True)
    assert model.config._attn_implementation == own
    assert "attention is a kind of its own" in capsys.readouterr().out
