"""Models whose head, causality, positions or vocabulary do not allow training are refused."""

import pytest
import torch
from families import are_logits_close, model_of, model_whose_rounding_grows
from models import VOCABULARY, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fullft.attention.choice import choose_attention
from fullft.errors import ModelError, OptionsError
from fullft.model.checks import check_model
from fullft.model.parts import decoder_layers


def prepare(model: PreTrainedModel, longest: int, packing: bool) -> None:
    """Choose the attention and check the model, as train.py does."""
    choose_attention(model, packing)
    check_model(model, VOCABULARY - 1, longest, packing)


def test_logits_that_need_the_token_ids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    original = type(model).forward

    def forward(self: PreTrainedModel, input_ids: torch.Tensor | None = None, **options: object) -> object:
        outputs = original(self, input_ids, **options)
        if input_ids is not None:
            outputs.logits = outputs.logits + input_ids[..., None]
        return outputs

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ModelError, match="mixes its head with its decoder"):
        prepare(model, 64, packing=False)


def test_token_without_an_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match=f"has token {VOCABULARY}, the model only {VOCABULARY} embeddings"):
        check_model(tiny_model("llama", torch.float32), VOCABULARY, 64, packing=False)


def test_check_changes_neither_attention_nor_mode() -> None:
    for training in (True, False):
        model = tiny_model("llama", torch.float32).train(training)
        check_model(model, VOCABULARY - 1, 64, packing=True)
        assert model.config._attn_implementation == "sdpa" and model.training is training


def test_isolation_allows_other_rounding_of_other_lengths() -> None:
    """A processor may have another kernel for 32 tokens than for 64, as those with AMX do."""
    model = model_whose_rounding_grows()
    ids, positions = torch.arange(1, 33).repeat(1, 2), torch.arange(32).repeat(1, 2)

    def round_otherwise(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 2**-7) if output.shape[1] == 32 else output

    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(round_otherwise)
    prepare(model, 64, packing=True)
    behind = model(ids, position_ids=positions, use_cache=False).logits[:, 32:].float()
    alone = model(ids[:, :32], position_ids=positions[:, :32], use_cache=False).logits.float()
    assert not are_logits_close(behind, alone)  # else these could be compared


@pytest.mark.parametrize("layers_are_known", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_with_running_positions_is_not_packed(dtype: torch.dtype, layers_are_known: bool) -> None:
    """Its second document does not depend on the first, but on how long that is."""
    model = tiny_model("gpt2", dtype)
    if not layers_are_known:  # then logits are all that can be compared
        model.config.n_layer += 1
        with pytest.raises(ModelError, match="no decoder layers"):
            decoder_layers(model)
    prepare(model, 64, packing=True)
    model.transformer.wpe.register_forward_pre_hook(lambda _, inputs: torch.arange(inputs[0].shape[-1])[None])
    prepare(model, 64, packing=False)
    with pytest.raises(ModelError, match="without --packing"):
        prepare(model, 64, packing=True)


def test_model_without_positions_is_not_packed() -> None:
    model = model_of(AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    prepare(model, 64, packing=False)
    with pytest.raises(ModelError, match="without --packing"):
        prepare(model, 64, packing=True)


def test_forward_without_position_ids_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    original = type(model).forward

    def forward(self: PreTrainedModel, input_ids: torch.Tensor | None = None, use_cache: bool = False) -> object:
        return original(self, input_ids, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ModelError, match="takes no position_ids: train it without --packing"):
        prepare(model, 64, packing=True)


def test_sequences_longer_than_a_models_positions_are_refused() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    prepare(AutoModelForCausalLM.from_config(config), 40, packing=False)
    with pytest.raises(OptionsError, match="--max_length 40"):
        prepare(AutoModelForCausalLM.from_config(config), 41, packing=False)
