"""Recomputing changes what is kept, and nothing else: losses and gradients stay the same to the bit."""

import functools
import itertools
import operator
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from global_batches import UNEVEN, our_gradients
from models import SHAPE, make_config, summed_loss, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from transformers import AutoModelForCausalLM, OlmoConfig

from fullft.attention.choice import attend_by_document
from fullft.errors import ModelError
from fullft.model.parts import decoder_layers
from fullft.model.precision import dtype_of
from fullft.transforms import activation_checkpointing
from fullft.transforms.activation_checkpointing import _Products, apply_activation_checkpointing

PRECISIONS = ["fp32", "bf16-mixed", "bf16-true"]
FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "gemma2"]
MODES = ["selective", "full", "every_1", "every_2", "every_3"]


# Each mode with each family, and both with each precision. All other combinations are slow.
PAIRWISE = {
    (PRECISIONS[(f + m) % 3], family, mode) for f, family in enumerate(FAMILIES) for m, mode in enumerate(MODES)
}


@pytest.mark.parametrize(
    ("precision", "family", "mode"),
    [
        pytest.param(*case, marks=() if case in PAIRWISE else pytest.mark.slow)
        for case in itertools.product(PRECISIONS, FAMILIES, MODES)
    ],
)
def test_checkpointing_keeps_gradients_bitwise_with_dropout(precision: str, family: str, mode: str) -> None:
    gradients = []
    for checkpointing in ("none", mode):
        config = make_config(precision=precision, activation_checkpointing=checkpointing)
        model = tiny_model(family, dtype_of(config.numerics.weights), dropout=0.1)
        attend_by_document(model)
        apply_activation_checkpointing(model, config)
        torch.manual_seed(7)
        autocast = config.numerics.autocast
        gradients.append(our_gradients(model, UNEVEN, autocast=autocast, global_batch_size=8)[1])
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("mode", ["selective", "full", "every_2"])
def test_checkpointed_layers_that_share_weights_sum_gradients_alike(mode: str) -> None:
    """Autocast copies such a weight once, and its gradients add up there, in bf16. Zamba-2 shares whole blocks."""
    gradients = []
    for checkpointing in ("none", mode):
        model = tiny_model("llama", torch.float32)
        layers = decoder_layers(model)
        layers[2].mlp = layers[1].mlp = layers[0].mlp
        apply_activation_checkpointing(model, make_config(activation_checkpointing=checkpointing))
        gradients.append(our_gradients(model, UNEVEN, autocast=True, global_batch_size=8)[1])
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_model_that_overwrites_kept_results_is_refused() -> None:
    """Backward would read what was written there: OLMo clips its queries, keys and values in place."""
    config = OlmoConfig(**SHAPE, clip_qkv=0.05)
    for mode in ("full", "selective"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()
        apply_activation_checkpointing(model, make_config(activation_checkpointing=mode))
        with nullcontext() if mode == "full" else pytest.raises(ModelError, match=r"overwrites .* full, or none"):
            summed_loss(model, torch.ones(1, 8, dtype=torch.int64)).backward()


def test_checkpointing_without_the_random_state_changes_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the loss stays the same, so only gradients show it."""

    def forgetful(*args: object, **kwargs: object) -> object:
        return checkpoint(*args, **{**kwargs, "preserve_rng_state": False})

    monkeypatch.setattr(activation_checkpointing, "checkpoint", functools.wraps(checkpoint)(forgetful))
    results = []
    for checkpointing in ("none", "full"):
        model = tiny_model("gpt2", torch.float32, dropout=0.1)
        apply_activation_checkpointing(model, make_config(activation_checkpointing=checkpointing))
        torch.manual_seed(7)
        # One micro-batch: with more, the random stream of the next forward would differ too.
        results.append(our_gradients(model, UNEVEN, global_batch_size=8, per_device_train_batch_size=8))
    (loss, plain), (same_loss, recomputed) = results
    assert loss == same_loss
    assert not all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("mode", ["selective", "full", "every_2"])
def test_checkpointing_keeps_fewer_activations(mode: str) -> None:
    saved = {}
    for checkpointing in ("none", mode):
        model = tiny_model("llama", torch.float32)
        apply_activation_checkpointing(model, make_config(activation_checkpointing=checkpointing))
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(input_ids=torch.ones(1, 32, dtype=torch.int64), use_cache=False)
        saved[checkpointing] = total
    assert saved[mode] < 0.8 * saved["none"]


class Counted(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[called.name()] += 1
        return called(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("gpt2", "fullft::attention"),
        ("llama", "fullft::attention"),
        ("llama", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_selective_checkpointing_computes_no_product_twice(family: str, attention: str) -> None:
    products, cheap = {}, {}
    for mode in ("none", "selective", "full"):
        model = tiny_model(family, torch.float32)
        if "fullft" in attention:
            attend_by_document(model)
        apply_activation_checkpointing(model, make_config(activation_checkpointing=mode))
        with Counted() as counted:
            summed_loss(model, torch.ones(1, 32, dtype=torch.int64)).backward()
        products[mode] = [counted.calls[name] for name in ("aten::mm", "aten::addmm", attention)]
        cheap[mode] = counted.calls["aten::mul.Tensor"]
    assert products["selective"] == products["none"] and products["none"][2] == 4 and cheap["selective"] > cheap["none"]
    assert all(map(operator.ge, products["full"], products["none"])) and products["full"] != products["none"]


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, True), (0.1, False)])
def test_attention_with_dropout_is_recomputed(dropout: float, kept: bool) -> None:
    """Were it kept, what draws after it would draw its numbers. No kernel of a CPU has dropout, so none runs here."""
    vectors = [torch.zeros(1, 1, 1, 1)] * 3
    policy, context = _Products().policy, SimpleNamespace(op_output=vectors)
    flash = policy(context, torch.ops.aten._scaled_dot_product_flash_attention.default, *vectors, dropout)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert (flash is CheckpointPolicy.MUST_SAVE) is kept
    assert (policy(context, efficient, *vectors, None, True, dropout_p=dropout) is CheckpointPolicy.MUST_SAVE) is kept


def test_checkpointed_model_generates_with_a_cache() -> None:
    model = tiny_model("llama", torch.float32).eval()
    prompt = torch.tensor([[5, 6, 7]])
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    apply_activation_checkpointing(model, make_config(activation_checkpointing="full"))
    assert torch.equal(plain, model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0))
