"""Memory figures are true: the tracker against arithmetic, the plan against the tracker. Neither leaves a trace."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, make_config, optimizer_of, summed_loss, tiny_model
from torch import nn
from transformers import PreTrainedModel

from fullft.attention.documents import apply_document_attention
from fullft.config.config import Config
from fullft.data.batches import MicroBatch
from fullft.memory import snapshot as allocator
from fullft.memory import worst_step as step_module
from fullft.memory.plan import Batch, plan_step
from fullft.memory.tracker import COMPONENTS, MemoryTracker, Profile
from fullft.memory.worst_step import take_worst_step
from fullft.model import loss as loss_module
from fullft.model.parts import PRECISIONS, decoder_layers
from fullft.optim.adamw import AdamW
from fullft.saving import output_dir
from fullft.storage.tiers import host_pieces
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing

KIB = 1024


def micro_batch(config: Config, length: int, sequences: int = 1) -> MicroBatch:
    """Random tokens; packed, two documents in each sequence, of lengths that attention rounds up."""
    ids = torch.randint(0, VOCABULARY, (sequences, length))
    inputs = {"input_ids": ids}
    if config.packing:
        documents = [torch.arange(length // 2 - 1), torch.arange(length - length // 2 + 1)]
        inputs["position_ids"] = torch.cat(documents).repeat(sequences, 1)
    return MicroBatch(inputs, ids.clone(), ids.numel(), sequences * (length - 1))


def autocast_of(config: Config, device: str = "cpu") -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=PRECISIONS[config.precision].autocast)


def model_of(family: str, config: Config, **options: object) -> PreTrainedModel:
    model = tiny_model(family, PRECISIONS[config.precision].weights, **options)
    apply_document_attention(model)
    apply_activation_checkpointing(model, config)
    return model


def worst_step(
    model: PreTrainedModel, config: Config, batch: Batch, count: int | None = None, optimizer=None
) -> Profile:
    count = min(2, config.gradient_accumulation_steps) if count is None else count
    held_out = micro_batch(config, batch.evaluation_length, batch.sequences) if batch.evaluation_length else None
    return take_worst_step(
        model,
        optimizer or optimizer_of(model, config),
        [micro_batch(config, batch.length, batch.sequences) for _ in range(count)],
        held_out,
        autocast_of(config),
        config.max_grad_norm,
    )


# ---------------------------------------------------------------------------------------------- by hand


@pytest.fixture
def tracker() -> MemoryTracker:
    """One that starts from a model without a single byte of its own: only what the test does is counted."""
    model = tiny_model("llama", torch.float32)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    for module in model.modules():
        module._buffers.clear()
    return MemoryTracker(model, optimizer_of(model, make_config(precision="fp32")))


def test_a_tensor_is_counted_from_birth_to_death(tracker: MemoryTracker) -> None:
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


def test_in_place_operations_take_nothing(tracker: MemoryTracker) -> None:
    with tracker:
        tensor = torch.ones(256)
        tensor.add_(1).mul_(2).clamp_(min=0)
        tensor[::2] = 3
    assert max(tracker.profile().totals) <= KIB + 8  # the number 3


def test_a_chain_peaks_where_arithmetic_says(tracker: MemoryTracker) -> None:
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
        tracker.forward({})
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


def test_the_negative_control_counting_views_would_be_noticed(
    tracker: MemoryTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def see(self, tensor: torch.Tensor, component: str):
        self._events.append((1, step_block(tensor, component), self._moment))

    def step_block(tensor: torch.Tensor, component: str):
        from fullft.memory.tracker import Block

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
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
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
def test_the_optimizer_state_of_8_bits(masters: str) -> None:
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
def test_what_is_offloaded_is_counted_where_it_lives(accumulation: int, tier: str) -> None:
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


def test_released_gradients_are_there_one_at_a_time(small_chunks: int) -> None:
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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_components_add_up_at_the_peak_and_at_every_event(precision: str) -> None:
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


def test_activations_and_logits_are_gone_after_backward_and_gradients_after_the_step() -> None:
    config = make_config()
    profile = worst_step(model_of("llama", config), config, Batch(1, 32))
    first = next(i for i, moment in enumerate(profile.moments) if moment.phase == "optimizer_step")
    assert profile.curves["activations"][first] == profile.curves["logits"][first] == 0
    assert profile.curves["gradients"][-1] == 0
    assert profile.curves["gradients"][first] == max(profile.curves["gradients"])


def test_checkpointing_keeps_layer_inputs_alone() -> None:
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


def test_autocasts_weight_copies_are_temporaries() -> None:
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


def test_of_layers_that_are_recomputed_autocast_keeps_no_copies() -> None:
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


def test_evaluation_sees_no_activations_and_its_own_length() -> None:
    config = make_config()
    short, long = (worst_step(model_of("llama", config), config, Batch(1, 16, length)) for length in (16, 64))
    assert long.to_dict()["phases"]["evaluation"] > short.to_dict()["phases"]["evaluation"]
    for event, moment in enumerate(long.moments):
        if moment.phase == "evaluation":
            assert long.curves["activations"][event] == long.curves["gradients"][event] == 0


# ---------------------------------------------------------------------------------------------- no consequences


def train(model: PreTrainedModel, optimizer: AdamW, config: Config, steps: int) -> list[torch.Tensor]:
    """Some steps as train.py takes them, with dropout."""
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (2, 24), generator=random)
        with autocast_of(config):
            loss = summed_loss(model, ids) / 46
        loss.backward()
        optimizer.clip_gradients(max_norm=0.0 if "released" in config.offload else 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def hooks_on(model: PreTrainedModel) -> list[int]:
    """Count what is hooked to each module and each parameter."""
    on_modules = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return on_modules + [len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters()]


def all_states(optimizer: AdamW) -> list[torch.Tensor]:
    return [
        piece.clone()
        for parameter in optimizer.parameters
        for array in optimizer.states_of(parameter).values()
        for piece in host_pieces(array)
    ]


UNDISTURBED: list[dict[str, object]] = [
    {"precision": "fp32"},
    {"precision": "bf16-mixed", "optim": "adamw_8bit"},
    {"master_weights": "none"},
    {"master_weights": "stochastic"},
    {"master_weights": "split"},
    {"offload": "optimizer=host,gradients=host"},
    {"offload": "optimizer=disk,gradients=disk", "optim": "adamw_8bit"},
    {"offload": "optimizer=host,gradients=released", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
]


@pytest.mark.parametrize("options", UNDISTURBED, ids=lambda options: " ".join(map(str, options.values())))
def test_a_run_goes_on_bitwise_as_if_the_worst_step_had_not_been(
    options: dict[str, object], tmp_path: Path, small_chunks: int
) -> None:
    config = make_config(
        **options, activation_checkpointing="full", weight_decay=0.1, learning_rate=1e-3, output_dir=str(tmp_path)
    )
    results = []
    for with_worst_step in (False, True):
        model = model_of("gpt2", config, dropout=0.1)
        optimizer = optimizer_of(model, config)
        torch.manual_seed(5)
        if with_worst_step:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            hooks = hooks_on(model)
            torch.manual_seed(99)
            prepared = [micro_batch(config, 24), micro_batch(config, 24)]
            torch.manual_seed(5)
            count = min(2, config.gradient_accumulation_steps)
            take_worst_step(model, optimizer, prepared[:count], prepared[0], autocast_of(config), config.max_grad_norm)
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
            assert optimizer.num_steps == 0 and not any(piece.any() for piece in all_states(optimizer))
            assert [group["lr"] for group in optimizer.param_groups] == [config.learning_rate] * 2
            assert model.training and all(parameter.grad is None for parameter in model.parameters())
            assert hooks == hooks_on(model)
        losses = train(model, optimizer, config, steps=3)
        results.append(
            (losses, [parameter.detach().clone() for parameter in model.parameters()] + all_states(optimizer))
        )
    (plain, plain_weights), (after, after_weights) = results
    assert all(torch.equal(one, other) for one, other in zip(plain, after, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(plain_weights, after_weights, strict=True))


def test_without_putting_the_random_state_back_the_run_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    from contextlib import nullcontext

    config = make_config(precision="fp32")
    losses = []
    for forked in (True, False):
        model = model_of("gpt2", config, dropout=0.1)
        optimizer = optimizer_of(model, config)
        prepared = [micro_batch(config, 24)]
        if not forked:
            monkeypatch.setattr(step_module.torch.random, "fork_rng", lambda *_, **__: nullcontext())
        torch.manual_seed(5)
        take_worst_step(model, optimizer, prepared, None, autocast_of(config), 1.0)
        losses += train(model, optimizer, config, steps=1)
    assert not torch.equal(*losses)


def test_a_failing_worst_step_cleans_up_too() -> None:
    config = make_config(precision="fp32")
    model = model_of("llama", config)
    optimizer = optimizer_of(model, config)
    broken = micro_batch(config, 8)
    broken.labels[0, 3] = VOCABULARY  # no such class
    with pytest.raises(RuntimeError, match="out of bounds"):
        take_worst_step(model, optimizer, [broken], None, autocast_of(config), 1.0)
    assert optimizer.num_steps == 0 and not any(piece.any() for piece in all_states(optimizer))
    assert optimizer.param_groups[0]["lr"] == config.learning_rate
    assert all(optimizer.gradients.of(parameter) is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------- planned = tracked

# Family, precision, checkpointing, optimizer, accumulation, packing, sequences x tokens, held-out tokens: each value of
# each with each family, and each pair of the others at least once.
AGREEMENT = [
    ("gpt2", "fp32", "none", "adamw", 1, False, Batch(2, 48, 32)),
    ("gpt2", "bf16-mixed", "full", "adamw_8bit", 4, True, Batch(1, 64, 64)),
    ("gpt2", "bf16-true", "every_2", "adamw", 4, False, Batch(1, 40)),
    ("llama", "fp32", "full", "adamw", 4, True, Batch(2, 48, 32)),
    ("llama", "bf16-mixed", "none", "adamw", 4, False, Batch(1, 300, 64)),  # more than attention has in a block
    ("llama", "bf16-true", "every_2", "adamw_8bit", 1, True, Batch(1, 64)),
    ("mistral", "fp32", "every_2", "adamw_8bit", 4, False, Batch(2, 48, 32)),
    ("mistral", "bf16-mixed", "none", "adamw", 1, True, Batch(1, 64, 64)),
    ("mistral", "bf16-true", "full", "adamw", 1, False, Batch(4, 16, 64)),
    ("qwen2", "fp32", "none", "adamw_8bit", 1, True, Batch(2, 48, 32)),
    ("qwen2", "bf16-mixed", "every_2", "adamw", 4, False, Batch(1, 64)),
    ("qwen2", "bf16-true", "full", "adamw", 4, True, Batch(1, 4, 4)),
    ("gemma2", "fp32", "full", "adamw", 1, False, Batch(2, 48, 32)),
    ("gemma2", "bf16-mixed", "every_2", "adamw", 1, True, Batch(1, 64, 64)),
    ("gemma2", "bf16-true", "none", "adamw_8bit", 4, False, Batch(3, 10, 30)),
    ("phi", "fp32", "every_2", "adamw", 4, True, Batch(2, 48, 32)),
    ("phi", "bf16-mixed", "full", "adamw", 1, False, Batch(1, 64)),
    ("phi", "bf16-true", "none", "adamw_8bit", 4, False, Batch(1, 64, 64)),
    ("gpt2", "bf16-mixed", "selective", "adamw", 4, False, Batch(2, 48, 32)),
    ("llama", "fp32", "selective", "adamw", 1, True, Batch(1, 300, 64)),
    ("mistral", "bf16-true", "selective", "adamw", 4, True, Batch(1, 64, 64)),
    ("gemma2", "bf16-mixed", "selective", "adamw_8bit", 4, True, Batch(1, 64)),
]
# What else a run may keep, and where, in turn with these cases.
PLACES: list[dict[str, object]] = [
    {},
    {"master_weights": "none"},
    {"offload": "optimizer=host"},
    {"master_weights": "stochastic", "offload": "optimizer=disk,gradients=disk"},
    {"offload": "gradients=host"},
    {"offload": "optimizer=disk,gradients=host", "master_weights": "none"},
    {"offload": "gradients=disk"},
]


@pytest.mark.parametrize(
    ("family", "precision", "mode", "optim", "accumulation", "packing", "batch", "place"),
    [(*case, PLACES[number % len(PLACES)]) for number, case in enumerate(AGREEMENT)],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_the_plan_equals_what_is_tracked(
    family: str,
    precision: str,
    mode: str,
    optim: str,
    accumulation: int,
    packing: bool,
    batch: Batch,
    place: dict[str, object],
    tmp_path: Path,
    small_chunks: int,
) -> None:
    config = make_config(
        precision=precision,
        activation_checkpointing=mode,
        optim=optim,
        gradient_accumulation_steps=accumulation,
        packing=packing,
        output_dir=str(tmp_path),
        **place,
    )
    model = model_of(family, config, dropout=0.1 if family in ("gpt2", "phi") else 0.0)
    planned = plan_step(config, model.config, batch)
    tracked = worst_step(model, config, batch).to_dict()
    assert planned["peak_phase"] == tracked["peak_phase"]
    assert planned["peak_bytes"] == pytest.approx(tracked["peak_bytes"], rel=1e-3)
    for kind in ("components", "at_peak", "phases"):
        assert planned[kind] == pytest.approx(tracked[kind], rel=1e-3)
    assert (planned["host_bytes"], planned["disk_bytes"]) == (tracked["host_bytes"], tracked["disk_bytes"])
    assert (planned["host_bytes"] > 0) is ("host" in config.offload)
    assert (planned["disk_bytes"] > 0) is ("disk" in config.offload)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])  # plain heads, soft-capped ones, and with a bias
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_plan_of_many_loss_chunks_equals_what_is_tracked_to_the_byte(
    precision: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine chunks, the last one cut, of logits that are most of the step; held out there are as many."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    config, batch = make_config(precision=precision, activation_checkpointing="full"), Batch(3, 22, 23)
    model = model_of(family, config)
    tracked = worst_step(model, config, batch).to_dict()
    planned = plan_step(config, model.config, batch)
    assert {name: planned[name] for name in tracked} == tracked
    # The negative control: one chunk of all tokens.
    monkeypatch.setattr(loss_module, "_chunks", lambda count: [(0, count)])
    assert plan_step(config, model.config, batch)["peak_bytes"] > tracked["peak_bytes"]


def test_a_plan_for_other_options_would_be_noticed() -> None:
    """The negative control: each option changes the figures by far more than the tolerance."""
    tracked_config = make_config(precision="bf16-mixed", gradient_accumulation_steps=4)
    model = model_of("llama", tracked_config)
    tracked = worst_step(model, tracked_config, Batch(1, 64, 64)).to_dict()
    changes = [
        {"precision": "fp32"},
        {"activation_checkpointing": "full"},
        {"optim": "adamw_8bit"},
        {"gradient_accumulation_steps": 1},
        {"offload": "optimizer=host"},
        {"offload": "gradients=disk"},
        {"precision": "bf16-true"},
    ]
    for change in changes:
        other = make_config(**{"precision": "bf16-mixed", "gradient_accumulation_steps": 4, **change})
        planned = plan_step(other, model.config, Batch(1, 64, 64))
        assert planned["peak_bytes"] != pytest.approx(tracked["peak_bytes"], rel=1e-2), change


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_plan_is_within_2_percent_of_the_allocators_peak(precision: str, mode: str) -> None:
    """At a size where the allocator's rounding to 512 bytes and the matrix library's workspace weigh little."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = make_config(precision=precision, activation_checkpointing=mode, gradient_accumulation_steps=2)
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=PRECISIONS[precision].weights).cuda().train()
    apply_activation_checkpointing(model, config)
    planned = plan_step(config, shape, Batch(1, 2048, 512))
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 32000, (1, 2048))
    train_batch = MicroBatch({"input_ids": ids}, ids, 2048, 2047)
    held_out = MicroBatch({"input_ids": ids[:, :512]}, ids[:, :512].contiguous(), 512, 511)
    optimizer = optimizer_of(model, config)
    take_worst_step(model, optimizer, [train_batch] * 2, held_out, autocast_of(config, "cuda"), 1.0)
    assert planned["peak_bytes"] == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.02)


# ---------------------------------------------------------------------------------------------- the allocator's word


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device's figures, and an allocator that records nothing but writes."""
    for name, value in {
        "max_memory_allocated": 70,
        "max_memory_reserved": 100,
        "memory_reserved": 90,
        "mem_get_info": (800, 1000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 64}, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: Path(file).write_text("recorded"))
    return torch.device("cuda")


def test_what_the_allocator_says(pretended_cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = allocator.process_figures(pretended_cuda)
    assert figures.pop("resident_peak_bytes") > 0
    expected = {
        "allocated_peak_bytes": 70,
        "reserved_peak_bytes": 100,
        "unused_reserved_bytes": 30,
        "outside_bytes": 110,
    }
    assert figures == expected | {"pinned_host_peak_bytes": 64}
    assert set(allocator.process_figures(torch.device("cpu"))) == {"resident_peak_bytes"}
    monkeypatch.setattr(torch.cuda, "host_memory_stats", dict)  # before anything is pinned
    assert "pinned_host_peak_bytes" not in allocator.process_figures(pretended_cuda)
    monkeypatch.delattr(torch.cuda, "host_memory_stats")  # an older torch
    assert "pinned_host_peak_bytes" not in allocator.process_figures(pretended_cuda)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux, where a process inherits its parent's peak")
def test_the_resident_peak_is_the_processes_own() -> None:
    source = """
import resource
import torch
from fullft.memory.snapshot import peak_bytes

print(peak_bytes(torch.device("cpu")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    ballast = b"1" * 2**30
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    own, inherited = map(int, done.stdout.split())
    assert own < len(ballast) < inherited


def test_a_recording_waits_until_an_earlier_one_is_set_aside(pretended_cuda: torch.device, tmp_path: Path) -> None:
    """The worst step comes before the earlier run's files move: its recording must not move with them."""
    earlier = tmp_path / allocator.SNAPSHOT
    earlier.write_text("earlier")
    with allocator.recording(pretended_cuda, tmp_path):
        pass
    assert earlier.read_text() == "earlier"
    assert output_dir._own_files(tmp_path) == [Path(allocator.SNAPSHOT)]  # --overwrite_output_dir replaces it
    earlier.unlink()
    allocator.publish_recording(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [allocator.SNAPSHOT]
    assert earlier.read_text() == "recorded"


def test_a_recording_of_a_step_that_fails_is_there_at_once(pretended_cuda: torch.device, tmp_path: Path) -> None:
    with pytest.raises(MemoryError), allocator.recording(pretended_cuda, tmp_path / "new"):
        raise MemoryError
    assert [file.name for file in (tmp_path / "new").iterdir()] == [allocator.SNAPSHOT]
