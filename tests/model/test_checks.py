"""Models whose head, causality, positions or vocabulary do not allow training are refused."""

from collections.abc import Callable

import pytest
import torch
from families import EXPERT_FAMILIES, are_logits_close, model_of, model_whose_rounding_grows, of_experts
from models import SHAPE, VOCABULARY, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fullft.attention.choice import choose_attention
from fullft.errors import ModelError, OptionsError
from fullft.model.checks import check_model
from fullft.model.parts import decoder_layers
from fullft.model.probing import DOCUMENT, dependence_tolerance, largest_dependence, probe, probing


def prepare(model: PreTrainedModel, longest: int, joins_rows: bool) -> None:
    """Choose the attention and check the model, as train.py does."""
    choose_attention(model, joins_rows)
    check_model(model, VOCABULARY - 1, longest, joins_rows)


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
        prepare(model, 64, joins_rows=False)


def test_token_without_an_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match=f"has token {VOCABULARY}, the model only {VOCABULARY} embeddings"):
        check_model(tiny_model("llama", torch.float32), VOCABULARY, 64, joins_rows=False)


def test_check_changes_neither_attention_nor_mode() -> None:
    for training in (True, False):
        model = tiny_model("llama", torch.float32).train(training)
        check_model(model, VOCABULARY - 1, 64, joins_rows=True)
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
    prepare(model, 64, joins_rows=True)
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
    prepare(model, 64, joins_rows=True)
    model.transformer.wpe.register_forward_pre_hook(lambda _, inputs: torch.arange(inputs[0].shape[-1])[None])
    prepare(model, 64, joins_rows=False)
    with pytest.raises(ModelError, match="without --packing"):
        prepare(model, 64, joins_rows=True)


def test_forward_without_position_ids_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    original = type(model).forward

    def forward(self: PreTrainedModel, input_ids: torch.Tensor | None = None, use_cache: bool = False) -> object:
        return original(self, input_ids, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ModelError, match="takes no position_ids: train it without --packing"):
        prepare(model, 64, joins_rows=True)


def test_sequences_longer_than_a_models_positions_are_refused() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    prepare(AutoModelForCausalLM.from_config(config), 40, joins_rows=False)
    with pytest.raises(OptionsError, match="--max_length 40"):
        prepare(AutoModelForCausalLM.from_config(config), 41, joins_rows=False)


# ---------------------------------------------------------------------------------------------- rounding or a leak

DTYPES = [torch.float32, torch.bfloat16]
WITHOUT_ISOLATION: dict[str, dict[str, object]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "lfm2": {**SHAPE, "layer_types": ["conv", "full_attention", "conv", "conv"]},
    "jamba": {**SHAPE, "num_hidden_layers": 2, "use_mamba_kernels": False},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_of_any_seed_are_trainable(family: str, dtype: torch.dtype) -> None:
    packs = family != "gpt_oss"  # whose masks leave out where documents begin
    for seed in range(5):
        prepare(model_of(of_experts(family, num_hidden_layers=2), dtype, seed), 64, joins_rows=packs)


def test_other_tokens_change_the_rounding_of_experts() -> None:
    """The control: equality to the bit would refuse some of these models."""
    is_equal = []
    for seed in range(5):
        with probing(model := model_of(of_experts("mixtral"), seed=seed)):
            one, other = (probe(model, [*DOCUMENT, last])[:-1] for last in (1, 2))
        is_equal.append(torch.equal(one, other))
    assert not all(is_equal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_another_order_are_no_leak(dtype: torch.dtype) -> None:
    """As on devices whose kernels round more: experts off by 5e-7 before they are rounded to their dtype."""
    for seed in range(5):
        model = model_of(of_experts("mixtral"), dtype, seed)
        for layer in decoder_layers(model):
            _sum_in_any_order(layer.mlp.experts)
        prepare(model, 64, joins_rows=True)


def _sum_in_any_order(experts: nn.Module) -> None:
    original, dtype = experts.forward, experts.down_proj.dtype
    experts.float()

    def forward(hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        exact = original(hidden.float(), indices, weights.float())
        return (exact * (1 + 5e-7 * torch.randn_like(exact))).to(dtype)

    experts.forward = forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_leaks_of_a_thousandth_are_found(family: str, dtype: torch.dtype) -> None:
    """One layer adds a thousandth of what it adds anyway, from the last token; with packing, from the first."""
    for seed in range(3):
        for place, packing, message in ((-1, False, "not a causal"), (0, True, "without --packing")):
            model = tiny_model(family, dtype, seed=seed) if family == "llama" else model_of(of_experts(family), dtype)
            prepare(model, 64, joins_rows=True)
            decoder_layers(model)[seed].register_forward_hook(_leaking(1e-3, place))
            with pytest.raises(ModelError, match=message):
                prepare(model, 64, packing)


def _leaking(share: float, place: int) -> Callable[..., torch.Tensor]:
    def leak(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        hidden, leaked = output.float(), output.float()[:, [place]]
        added = (hidden - inputs[0].float()).abs().mean()
        return (hidden + share * added / leaked.abs().mean() * leaked).to(output.dtype)

    return leak


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", WITHOUT_ISOLATION)
def test_families_without_isolation_are_not_packed(family: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        model = model_of(
            AutoConfig.for_model(family, **{**WITHOUT_ISOLATION[family], "vocab_size": VOCABULARY}), dtype, seed
        )
        prepare(model, 64, joins_rows=False)
        with pytest.raises(ModelError, match="without --packing"):
            prepare(model, 64, joins_rows=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_that_see_ahead_are_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)

    def mix(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + output.roll(-1, dims=1)  # each token sees the next one alone

    model.model.layers[1].mlp.register_forward_hook(mix)
    with pytest.raises(ModelError, match="not a causal language model"):
        prepare(model, 64, joins_rows=False)
    with probing(model):
        share = largest_dependence(model, [*DOCUMENT, 1], [*DOCUMENT, 2], None, slice(0, len(DOCUMENT)))
    assert share > 10 * dependence_tolerance(model)
