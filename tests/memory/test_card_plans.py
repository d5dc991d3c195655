"""A plan for a card is CUDA's on any machine: its tiles, its buffers on the host, its autocast."""

import mmap
from typing import Any

import pytest
import torch
from models import make_config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from worst_steps import deep

from fullft.memory.machine import margin_bytes
from fullft.memory.plan import Batch, plan_step
from fullft.memory.planned_autocast import _Widening
from fullft.optim.adamw import layout_of
from fullft.storage.locked import block_bytes

BATCH = Batch(2, 24, 16)


def plans_of(layers: int = 4, family: str = "llama", **options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan for a CPU, and for a card."""
    if torch.cuda.is_available():
        pytest.skip("this machine plans for its own card")
    here = plan_step(make_config(plan=True, **options), deep(family, layers), BATCH)
    return here, plan_step(make_config(plan=True, device_memory="24GiB", **options), deep(family, layers), BATCH)


def sizes_of(model_config: PreTrainedConfig) -> list[int]:
    with torch.device("meta"):
        return [parameter.numel() for parameter in AutoModelForCausalLM.from_config(model_config).parameters()]


def paged(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def test_buffers_of_a_card_are_the_host_s(small_chunks: int) -> None:
    """On the host are the sums of gradients in whole pages, and four blocks for chunks on their way."""
    here, card = plans_of(precision="fp32", offload="gradients=host")
    sizes = sizes_of(deep("llama", 4))
    sums = sum(paged(4 * size) for size in sizes)
    assert card["host_bytes"] == sums + 4 * block_bytes(4 * small_chunks)
    assert here["host_bytes"] == sum(4 * size for size in sizes)
    # A CPU adds to the sums at once; what a card sends off is there until it has arrived.
    assert card["phases"]["backward"] > here["phases"]["backward"]


def test_states_on_the_host_have_no_twins_of_slots(small_chunks: int) -> None:
    """Three slots of a card take each field of a chunk; with a disk the host has as many, in blocks of torch's."""
    options = {"precision": "fp32", "activation_checkpointing": "full"}
    on_host = plans_of(**options, offload="optimizer=host")[1]
    on_disk = plans_of(**options, offload="optimizer=disk")[1]
    slots = 3 * block_bytes(2 * 4 * small_chunks)  # both moments
    assert on_disk["host_bytes"] == slots
    sizes = sizes_of(deep("llama", 4))
    layouts = [layout_of(size, torch.float32, torch.float32, "none").values() for size in sizes]
    assert on_host["host_bytes"] == sum(paged(count * dtype.itemsize) for each in layouts for count, dtype in each)
    assert on_host["peak_bytes"] == on_disk["peak_bytes"]


def test_tiles_of_a_card_are_its_own(small_chunks: int) -> None:
    """A card updates a whole chunk at a time, with a master and a gradient in fp32; a CPU what its cache holds."""
    options = {"precision": "bf16-true", "activation_checkpointing": "full"}
    here, card = plans_of(**options)
    scratch = 2 * 4 * small_chunks
    # A tile of a CPU is a quarter of a chunk in these tests.
    more = card["phases"]["optimizer_step"] - here["phases"]["optimizer_step"]
    assert more == pytest.approx(scratch - scratch // 4, abs=1024)  # a CPU's norm has some numbers of its own


def test_only_a_card_has_a_margin() -> None:
    here, card = plans_of()
    assert here["margin_bytes"] == 0 and card["margin_bytes"] == margin_bytes(card["peak_bytes"])


# ---------------------------------------------------------------------------------------------- autocast

OPERATORS = {
    "pow": lambda x: x**3,
    "torch.pow": lambda x: torch.pow(x, 3.0),
    "exp": torch.exp,
    "rsqrt": lambda x: x.rsqrt(),
    "softplus": nn.functional.softplus,
    "softmax": lambda x: x.softmax(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "sum": lambda x: x.sum(),
    "layer_norm": lambda x: nn.functional.layer_norm(x, (4,)),
    "gelu": nn.functional.gelu,
    "mul": lambda x: x * 2,
    "softmax in bf16": lambda x: x.softmax(-1, dtype=torch.bfloat16),
}
AS_THEY_ARE = {"gelu", "mul", "softmax in bf16"}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_widened_as_cuda_widens_them(name: str) -> None:
    values, operator = torch.ones(2, 4, dtype=torch.bfloat16), OPERATORS[name]
    with torch.autocast("cpu", torch.bfloat16), _Widening():
        widened = operator(values)
    assert widened.dtype == (torch.bfloat16 if name in AS_THEY_ARE else torch.float32)
    with _Widening():
        assert operator(values).dtype == torch.bfloat16  # autocast is off


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_widens_these_operators(name: str) -> None:
    values = torch.ones(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), _Widening():
        planned = OPERATORS[name](values)
    with torch.autocast("cuda", torch.bfloat16):
        assert OPERATORS[name](values.cuda()).dtype == planned.dtype


def test_widened_activations_count_only_under_autocast() -> None:
    """GPT-2's activation takes a power; Llama's has no operator that is widened."""
    gpt2, gpt2_card = plans_of(family="gpt2", precision="bf16-mixed")
    llama, llama_card = plans_of(family="llama", precision="bf16-mixed")
    assert gpt2_card["components"]["activations"] > 1.1 * gpt2["components"]["activations"]
    assert llama_card["components"]["activations"] == pytest.approx(llama["components"]["activations"], rel=0.05)
    gpt2, gpt2_card = plans_of(family="gpt2", precision="bf16-true")
    assert gpt2_card["components"]["activations"] == pytest.approx(gpt2["components"]["activations"], rel=0.05)
