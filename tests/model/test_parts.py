"""The decoder is what the model's own forward calls, and its loss is the model's."""

import pytest
import torch
from families import CONFIGS, gemma3_that_sees, model_of
from models import VOCABULARY, summed_loss, tiny_model
from torch import nn

from fullft.attention.choice import choose_attention
from fullft.model.checks import check_model
from fullft.model.parts import decoder_of, num_embeddings


@pytest.mark.parametrize("family", CONFIGS)
def test_decoders_with_surroundings_give_the_model_own_loss(family: str) -> None:
    model = model_of(CONFIGS[family](), torch.float64)
    choose_attention(model, joins_rows=False)
    check_model(model, VOCABULARY - 1, 64, joins_rows=False)
    ids = torch.randint(1, VOCABULARY, (2, 20))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    assert summed_loss(model, ids).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.training


def test_decoder_is_what_forward_calls() -> None:
    for family in ("gpt2", "llama", "gemma2"):
        model = tiny_model(family)
        assert decoder_of(model) is model.get_decoder()
    seeing = model_of(gemma3_that_sees())
    assert decoder_of(seeing) is not seeing.get_decoder()  # which does not see
    assert not any(module._forward_pre_hooks for module in seeing.modules())


def test_embeddings_of_a_config_are_the_model_own() -> None:
    for config in (*(make() for make in CONFIGS.values()), tiny_model("gpt2").config):
        assert num_embeddings(config) == model_of(config).get_input_embeddings().weight.shape[0] > 1
