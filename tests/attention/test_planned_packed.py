"""The plan for a card knows what packed attention takes there: queries, keys, values, results and logsumexps."""

from collections.abc import Iterator
from typing import Any

import flash_attention
import pytest
import torch
from models import make_config, tiny_model
from transformers import LlamaConfig, PreTrainedModel
from worst_steps import worst_step

from fullft.attention import kernels, packed
from fullft.attention.choice import attend_packed
from fullft.memory import plan
from fullft.memory.plan import Batch, plan_step
from fullft.memory.planned_autocast import autocast_as_cuda
from fullft.model.precision import dtype_of
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing

CARD: dict[str, Any] = {"plan": True, "device_memory": 2**34}  # plans are made for one


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """A card's kernel computes here."""
    library = flash_attention.register()
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("family", "mode", "batch"),
    [
        ("llama", "none", Batch(2, 48, 32)),
        ("mistral", "selective", Batch(1, 64, 64)),
        ("qwen2", "full", Batch(2, 48, 32)),
        ("phi", "none", Batch(1, 64)),
    ],
)
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_plan_equals_what_is_tracked(family: str, mode: str, batch: Batch, precision: str) -> None:
    """The negative control is the model's own attention."""
    config = make_config(precision=precision, activation_checkpointing=mode, packing=True, **CARD)

    def tracked(model: PreTrainedModel) -> dict[str, object]:
        if config.numerics.autocast:
            autocast_as_cuda(model)
        apply_activation_checkpointing(model, config)
        return worst_step(model, config, batch).to_dict()

    model = tiny_model(family, dtype_of(config.numerics.weights))
    planned = plan_step(config, model.config, batch)
    assert planned["components"] != tracked(tiny_model(family, dtype_of(config.numerics.weights)))["components"]
    assert attend_packed(model, "cuda")
    found = tracked(model)
    for kind in ("components", "at_peak", "phases"):
        assert planned[kind] == pytest.approx(found[kind], rel=1e-3)


def activations(length: int, precision: str) -> float:
    """What forward keeps for backward, in bytes, of one packed row and a small Llama."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
    shape = LlamaConfig(num_attention_heads=4, num_hidden_layers=6, **sizes)
    config = make_config(precision=precision, activation_checkpointing="none", packing=True, **CARD)
    return float(plan_step(config, shape, Batch(1, length))["components"]["activations"])


@pytest.mark.parametrize("precision", ["bf16-true", "fp32"])
def test_planned_activations_grow_with_the_tokens(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With flash attention and with blocks. The negative control is the mask, which grows with their square."""
    assert activations(2048, precision) == pytest.approx(2 * activations(1024, precision), rel=1e-2)
    monkeypatch.setattr(plan, "attend_packed", lambda model, device_type: False)
    assert activations(2048, precision) > 2.5 * activations(1024, precision)


def test_operator_keeps_what_its_kernel_needs() -> None:
    """Each tensor once: those that go in, the result and the logsumexp, and the positions, which all layers share."""
    query, key, value = (torch.randn(1, heads, 48, 16).bfloat16().requires_grad_() for heads in (6, 2, 2))
    positions = torch.arange(48)[None] % 24
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    assert kernels.kernel_for(query.dtype, 16, None) is kernels.TORCH_FLASH
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed.packed_attention(query, key, value, 0.25, positions, None, None)
    assert sum(each.nbytes for each in kept) == 2 * 48 * 16 * (6 + 2 + 2 + 6) + 4 * 48 * 6 + positions.nbytes
