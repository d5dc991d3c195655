"""What is asked of a loaded model before it is trained: families with surroundings, windows in masks, no positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import SHAPE, VOCABULARY, summed_loss, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fullft.attention import documents as attention
from fullft.attention.documents import NAME
from fullft.errors import ModelError, OptionsError
from fullft.model.checks import require_fit
from fullft.model.parts import decoder_layers, decoder_of


def gemma3_that_sees() -> PreTrainedConfig:
    seeing = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    seeing |= {"image_size": 28, "patch_size": 14}
    text = {**SHAPE, "head_dim": 8, "pad_token_id": 0, "sliding_window": 8}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=seeing)


def opt() -> PreTrainedConfig:
    return AutoConfig.for_model("opt", **SHAPE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)


def llama4() -> PreTrainedConfig:
    more = {"intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 16}
    return AutoConfig.for_model("llama4_text", **{**SHAPE, **more})


CONFIGS = {"gemma3 that sees": gemma3_that_sees, "opt": opt, "llama4": llama4}


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


@pytest.mark.parametrize("family", CONFIGS)
def test_families_whose_decoder_has_surroundings_give_their_own_loss(family: str) -> None:
    model = model_of(CONFIGS[family](), torch.float64)
    require_fit(model, VOCABULARY - 1, 64, packing=False)
    ids = torch.randint(1, VOCABULARY, (2, 20))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    assert summed_loss(model, ids).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.training


def test_the_decoder_is_what_forward_calls() -> None:
    for family in ("gpt2", "llama", "gemma2"):
        model = tiny_model(family)
        assert decoder_of(model) is model.get_decoder()
    seeing = model_of(gemma3_that_sees())
    assert decoder_of(seeing) is not seeing.get_decoder()  # which does not see
    assert not any(module._forward_pre_hooks for module in seeing.modules())


def test_a_head_that_looks_past_its_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    original = type(model).forward

    def forward(self: PreTrainedModel, input_ids: torch.Tensor | None = None, **options: object) -> object:
        outputs = original(self, input_ids, **options)
        if input_ids is not None:
            outputs.logits = outputs.logits + input_ids[..., None]
        return outputs

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ModelError, match="mixes its head with its decoder"):
        require_fit(model, 1, 64, packing=False)


def qwen2_moe(window: int) -> PreTrainedConfig:
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2}
    experts |= {"num_experts_per_tok": 2, "use_sliding_window": True, "max_window_layers": 4}
    return AutoConfig.for_model("qwen2_moe", **SHAPE, **experts, sliding_window=window)


def llama4_of_chunks(chunk: int) -> PreTrainedConfig:
    config = llama4()
    config.attention_chunk_size = chunk
    return config


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("make", [qwen2_moe, llama4_of_chunks])
def test_a_window_that_stands_in_the_mask_alone_is_kept(make: Callable[[int], PreTrainedConfig], packing: bool) -> None:
    """The negative control: a window that is as long as the sequence."""
    ids = torch.randint(1, VOCABULARY, (1, 40))
    inputs = {"input_ids": ids, "position_ids": torch.arange(40)[None] % (25 if packing else 40)}
    model = model_of(make(8))
    theirs = model(**inputs, use_cache=False).logits
    require_fit(model, VOCABULARY - 1, 40, packing)
    assert torch.allclose(model(**inputs, use_cache=False).logits, theirs, atol=1e-5)
    without = model_of(make(40))
    without.load_state_dict(model.state_dict())
    assert not torch.allclose(without(**inputs, use_cache=False).logits, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", [False, True])
def test_attention_is_ours_where_it_agrees(packing: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def implementation() -> str:
        model = tiny_model("llama", dtype)
        require_fit(model, VOCABULARY - 1, 64, packing)
        return str(model.config._attn_implementation)

    assert implementation() == NAME
    original = attention.document_attention

    def differ(*arguments: Any) -> torch.Tensor:
        if isinstance(mistake, Exception):
            raise mistake
        return original(*arguments) * mistake

    monkeypatch.setattr(attention, "document_attention", differ)
    for mistake in (1.01 if dtype == torch.float32 else 1.5, float("nan"), ValueError("positions of three axes")):
        assert implementation() == "sdpa", mistake


def model_whose_rounding_grows() -> PreTrainedModel:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 40}
    return model_of(AutoConfig.for_model("llama", vocab_size=VOCABULARY, initializer_range=0.5, **shape)).bfloat16()


def are_logits_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 5e-2 * theirs.abs().max())


def test_attention_is_ours_where_rounding_grows_through_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.document_attention
    monkeypatch.setattr(attention, "document_attention", lambda *arguments: original(*arguments) * (1 + 2**-7))
    model = model_whose_rounding_grows()
    ids = torch.arange(1, 33)[None]
    theirs = model(ids, use_cache=False).logits.float()
    require_fit(model, VOCABULARY - 1, 64, packing=True)
    assert model.config._attn_implementation == NAME
    assert not are_logits_close(model(ids, use_cache=False).logits.float(), theirs)  # else these could be compared


def test_documents_are_isolated_where_products_of_other_lengths_round_otherwise() -> None:
    """A processor may have another kernel for 32 tokens than for 64, as those with AMX do."""
    model = model_whose_rounding_grows()
    ids, positions = torch.arange(1, 33).repeat(1, 2), torch.arange(32).repeat(1, 2)

    def round_otherwise(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 2**-7) if output.shape[1] == 32 else output

    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(round_otherwise)
    require_fit(model, VOCABULARY - 1, 64, packing=True)
    behind = model(ids, position_ids=positions, use_cache=False).logits[:, 32:].float()
    alone = model(ids[:, :32], position_ids=positions[:, :32], use_cache=False).logits.float()
    assert not are_logits_close(behind, alone)  # else these could be compared


@pytest.mark.parametrize("layers_are_known", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_positions_go_on_is_not_packed(dtype: torch.dtype, layers_are_known: bool) -> None:
    """Its second document does not depend on the first, but on how long that is."""
    model = tiny_model("gpt2", dtype)
    if not layers_are_known:  # then logits are all that can be compared
        model.config.n_layer += 1
        with pytest.raises(ModelError, match="no decoder layers"):
            decoder_layers(model)
    require_fit(model, VOCABULARY - 1, 64, packing=True)
    model.transformer.wpe.register_forward_pre_hook(lambda _, inputs: torch.arange(inputs[0].shape[-1])[None])
    require_fit(model, VOCABULARY - 1, 64, packing=False)
    with pytest.raises(ModelError, match="without --packing"):
        require_fit(model, VOCABULARY - 1, 64, packing=True)


def test_a_model_without_positions_is_not_packed() -> None:
    model = model_of(AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    require_fit(model, VOCABULARY - 1, 64, packing=False)
    with pytest.raises(ModelError, match="without --packing"):
        require_fit(model, VOCABULARY - 1, 64, packing=True)


def test_a_forward_that_takes_no_positions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    original = type(model).forward

    def forward(self: PreTrainedModel, input_ids: torch.Tensor | None = None, use_cache: bool = False) -> object:
        return original(self, input_ids, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ModelError, match="takes no position_ids: train it without --packing"):
        require_fit(model, 1, 64, packing=True)


def test_models_of_few_positions_are_asked_only_for_so_many() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    require_fit(AutoModelForCausalLM.from_config(config), VOCABULARY - 1, 40, packing=False)
    with pytest.raises(OptionsError, match="--max_length 40"):
        require_fit(AutoModelForCausalLM.from_config(config), VOCABULARY - 1, 41, packing=False)
