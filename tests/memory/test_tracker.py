"""The tracker's figures are those of arithmetic."""

from dataclasses import replace

import pytest
import torch
from models import make_config, optimizer_of, tiny_model
from torch import nn
from worst_steps import model_of, worst_step

from fullft.data.micro_batch import MicroBatch
from fullft.memory.plan import Batch
from fullft.memory.profile import COMPONENTS
from fullft.memory.tracker import Block, MemoryTracker
from fullft.model.parts import decoder_layers

KIB = 1024


@pytest.fixture
def tracker() -> MemoryTracker:
    """One that starts from a model without a single byte of its own: only what the test does is counted."""
    model = tiny_model("llama", torch.float32)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    for module in model.modules():
        module._buffers.clear()
    return MemoryTracker(model, optimizer_of(model, make_config(precision="fp32")))


def test_tensor_is_counted_from_birth_to_death(tracker: MemoryTracker) -> None:
    with tracker:
        tensor = torch.ones(256)
        del tensor
    assert tracker.profile().totals[-2:] == [KIB, 0]


def test_views_share_their_storage_and_keep_it_alive(tracker: MemoryTracker) -> None:
    with tracker:
        tensor = torch.ones(16, 16)
        view = tensor.t()[3:].detach()
        del tensor
        other = torch.ones(256)
        del view, other
    assert [total for total in tracker.profile().totals if total] == [KIB, 2 * KIB, KIB]


def test_in_place_operations_take_no_memory(tracker: MemoryTracker) -> None:
    with tracker:
        tensor = torch.ones(256)
        tensor.add_(1).mul_(2).clamp_(min=0)
        tensor[::2] = 3
    assert max(tracker.profile().totals) <= KIB + 8  # the number 3


def test_chain_of_operators_peaks_where_arithmetic_says(tracker: MemoryTracker) -> None:
    """Each result replaces its input, so two are alive at a time: 1 + 4 KiB, then 4 + 2 KiB."""
    with tracker:
        tensor = torch.ones(256)
        tensor = tensor.repeat(4)
        tensor = tensor.to(torch.bfloat16)
    profile = tracker.profile()
    assert [total for total in profile.totals if total] == [KIB, 5 * KIB, 4 * KIB, 6 * KIB, 2 * KIB]
    assert profile.totals[profile.peak] == 6 * KIB


def test_saved_tensors_are_activations_until_backward_frees_them(tracker: MemoryTracker) -> None:
    """exp keeps its result (1 KiB) and sum nothing; the square keeps its input, which is that result."""
    weight = nn.Parameter(torch.ones(256))
    tracker.model.register_parameter("extra", weight)
    tracker._see(weight, "parameters")
    with tracker:
        tracker.forward(MicroBatch({}, torch.empty(0), 0, 0))
        loss = (weight.exp() ** 2).sum()
        tracker.backward()
        loss.backward()
        del loss
        tracker.optimizer_step()
    figures = tracker.profile().to_dict()
    # Gradients on the way are temporaries; the loss, and its own gradient, which is made as recomputation makes things,
    # have 4 bytes each.
    assert figures["components"]["activations"] == KIB + 8
    assert figures["components"]["parameters"] == figures["components"]["gradients"] == KIB
    assert tracker.profile().curves["activations"][-1] == 0


def test_counting_views_changes_the_figures(tracker: MemoryTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    def see(self, tensor: torch.Tensor, component: str):
        self._events.append((1, step_block(tensor, component), self._moment))

    def step_block(tensor: torch.Tensor, component: str):
        return Block(tensor.numel() * tensor.element_size(), component, "")

    monkeypatch.setattr(MemoryTracker, "_see", see)
    with tracker:
        tensor = torch.ones(16, 16)
        tensor.t()
    assert tracker.profile().totals[-1] == 2 * KIB


# ---------------------------------------------------------------------------------------------- a model's step


# Bytes per parameter of weights, gradients with and without accumulation, and AdamW's states.
SIZES = {
    "fp32": ({"precision": "fp32"}, 4, 4, 4, 8),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 4, 4, 4, 8),
    "split": ({}, 2, 4, 2, 10),
    "stochastic": ({"master_weights": "stochastic"}, 2, 4, 2, 8),
    "none": ({"master_weights": "none"}, 2, 2, 2, 4),
}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("family", "case"),
    [
        *zip(["gpt2", "llama"] * 3, SIZES, strict=False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in zip(["llama", "gpt2"] * 3, SIZES, strict=False)),
    ],
)
def test_parameters_gradients_and_states_have_their_exact_sizes(family: str, case: str, accumulation: int) -> None:
    options, weight, accumulated, single, states = SIZES[case]
    config = make_config(**options, gradient_accumulation_steps=accumulation)
    model = model_of(family, config, tied=True)
    figures = worst_step(model, config, Batch(1, 32)).to_dict()
    count = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    assert figures["components"]["parameters"] == count * weight
    assert figures["components"]["gradients"] == count * (accumulated if accumulation > 1 else single)
    assert figures["components"]["optimizer_states"] == count * states
    assert figures["host_bytes"] == figures["disk_bytes"] == 0


@pytest.mark.parametrize("masters", ["split", "none"])
def test_8_bit_states_have_their_exact_size(masters: str) -> None:
    """Two bytes per element, two numbers per block of 256 elements; embeddings keep 32 bits."""
    config = make_config(optim="adamw_8bit", master_weights=masters)
    model = model_of("llama", config)
    figures = worst_step(model, config, Batch(1, 32)).to_dict()
    head = model.lm_head.weight.numel()
    others = sum(parameter.numel() for parameter in model.parameters()) - head
    assert head >= 16384
    expected = 8 * others + 2 * head + 2 * 4 * head // 256 + (2 * (head + others) if masters == "split" else 0)
    assert figures["components"]["optimizer_states"] == expected


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_offloaded_arrays_are_counted_where_they_live(accumulation: int, tier: str) -> None:
    options = {"gradient_accumulation_steps": accumulation}
    config = make_config(**options, offload=f"optimizer={tier},gradients={tier}")
    model = model_of("llama", config)
    moved, resident = (
        worst_step(model_of("llama", each), each, Batch(1, 32)).to_dict() for each in (config, make_config(**options))
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    gradients = count * (4 if accumulation > 1 else 2)
    assert moved["components"]["optimizer_states"] == moved["components"]["gradients"] == 0
    assert moved["peak_bytes"] < resident["peak_bytes"]
    if tier == "host":
        assert moved["host_bytes"] == 10 * count + gradients and moved["disk_bytes"] == 0
    else:
        padded = sum(-(-p.numel() * size // 4096) * 4096 for p in model.parameters() for size in (4, 4, 2))
        padded += sum(-(-p.numel() * gradients // count // 4096) * 4096 for p in model.parameters())
        assert moved["disk_bytes"] == padded and moved["host_bytes"] == 0
    assert moved["components"]["activations"] == resident["components"]["activations"]


def test_released_gradients_exist_one_at_a_time(small_chunks: int) -> None:
    config = make_config(gradient_accumulation_steps=1, max_grad_norm=0.0, offload="gradients=released")
    model = model_of("llama", config)
    released = worst_step(model, config, Batch(1, 32)).to_dict()
    resident = worst_step(model_of("llama", config), replace(config, offload="none"), Batch(1, 32)).to_dict()
    gradients = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert (released["components"]["gradients"], resident["components"]["gradients"]) == (0, gradients)
    # In backward, which begins with what forward has left, there is one, with what updating a tile of it takes.
    largest = max(parameter.numel() for parameter in model.parameters())
    spare = 2 * largest + 2 * 4 * small_chunks
    assert released["phases"]["backward"] <= released["phases"]["forward"] + spare and spare < gradients / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_components_add_up_at_every_event(precision: str) -> None:
    config = make_config(precision=precision, activation_checkpointing="every_2", packing=True)
    profile = worst_step(model_of("qwen2", config), config, Batch(2, 32, 32))
    figures = profile.to_dict()
    assert sum(figures["at_peak"].values()) == figures["peak_bytes"] == max(profile.totals)
    assert figures["peak_bytes"] == max(figures["phases"].values()) == figures["phases"][figures["peak_phase"]]
    assert set(figures["phases"]) == {"forward", "backward", "optimizer_step", "evaluation"}
    for event, total in enumerate(profile.totals):
        assert total == sum(profile.curves[name][event] for name in COMPONENTS)
        assert all(profile.curves[name][event] >= 0 for name in COMPONENTS)
    at_peak = sum(figures["at_peak"][name] for name in ("activations", "logits", "temporaries", "other"))
    assert sum(size for _, size in profile.modules_at_peak) == at_peak


def test_activations_are_gone_after_backward() -> None:
    config = make_config()
    profile = worst_step(model_of("llama", config), config, Batch(1, 32))
    first = next(i for i, moment in enumerate(profile.moments) if moment.phase == "optimizer_step")
    assert profile.curves["activations"][first] == profile.curves["logits"][first] == 0
    assert profile.curves["gradients"][-1] == 0
    assert profile.curves["gradients"][first] == max(profile.curves["gradients"])


def test_full_checkpointing_keeps_only_layer_inputs() -> None:
    """`full` keeps each layer's input; with the recomputed layer gone, 4 layers x 64 tokens x 32 x 4 bytes."""
    kept = {}
    for mode in ("none", "selective", "every_2", "full"):
        config = make_config(precision="fp32", activation_checkpointing=mode)
        model = model_of("llama", config)
        profile = worst_step(model, config, Batch(1, 64))
        # When backward begins, nothing has been recomputed yet.
        first = next(i for i, moment in enumerate(profile.moments) if moment.phase == "backward")
        kept[mode] = profile.curves["activations"][first]
    inputs = 4 * 64 * 32 * 4
    assert inputs <= kept["full"] < 2 * inputs  # the last norm, the rotary embedding and the loss keep something too
    assert kept["full"] < kept["every_2"] < kept["none"]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)][:-1]  # without the head
    products = 64 * 4 * (sum(linear.out_features for linear in linears) + 4 * 32)  # and what attention gives
    assert kept["selective"] == pytest.approx(kept["full"] + products, rel=1e-2)
    assert kept["every_2"] == pytest.approx((kept["full"] + kept["none"]) / 2, rel=1e-2)


def test_weight_copies_of_autocast_are_temporaries() -> None:
    """Every matrix of a layer, and the head, is copied to bf16 once and lives to the end of the forward."""
    maxima = {}
    for precision in ("fp32", "bf16-mixed"):
        config = make_config(precision=precision)
        model = model_of("llama", config)
        maxima[precision] = worst_step(model, config, Batch(1, 8)).to_dict()["components"]
    copies = 2 * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert maxima["bf16-mixed"]["temporaries"] >= copies
    assert maxima["bf16-mixed"]["activations"] < maxima["fp32"]["activations"]
    assert maxima["bf16-mixed"]["parameters"] == maxima["fp32"]["parameters"]


def test_autocast_keeps_no_copies_of_recomputed_layers() -> None:
    """Without recomputation backward needs them, so that they are there at the end of forward."""
    largest = {}
    for mode in ("none", "selective", "full"):
        config = make_config(precision="bf16-mixed", activation_checkpointing=mode)
        model = model_of("llama", config)
        profile = worst_step(model, config, Batch(1, 8))
        in_forward = (event for event, moment in enumerate(profile.moments) if moment.phase == "forward")
        largest[mode] = max(profile.curves["temporaries"][event] for event in in_forward)
    copies = 2 * sum(weight.numel() for weight in decoder_layers(model).parameters() if weight.dim() == 2)
    assert largest["full"] == largest["selective"] <= largest["none"] - 0.9 * copies


def test_two_micro_batches_stand_for_four() -> None:
    config = make_config(precision="bf16-mixed", gradient_accumulation_steps=4)
    two, four = (
        worst_step(model_of("llama", config), config, Batch(1, 32, 16), count=count).to_dict() for count in (2, 4)
    )
    one = worst_step(model_of("llama", config), config, Batch(1, 32, 16), count=1).to_dict()
    assert two == four
    assert one["peak_bytes"] < two["peak_bytes"]  # the negative control: gradients are there in the second backward


def test_evaluation_has_no_activations_and_its_own_length() -> None:
    config = make_config()
    short, long = (worst_step(model_of("llama", config), config, Batch(1, 16, length)) for length in (16, 64))
    assert long.to_dict()["phases"]["evaluation"] > short.to_dict()["phases"]["evaluation"]
    for event, moment in enumerate(long.moments):
        if moment.phase == "evaluation":
            assert long.curves["activations"][event] == long.curves["gradients"][event] == 0
