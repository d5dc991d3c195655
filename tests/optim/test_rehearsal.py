"""A rehearsed step changes nothing, and takes as many bytes as a whole one."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, make_config, optimizer_of, summed_loss, tiny_model
from transformers import PreTrainedModel
from worst_steps import deep, micro_batch, model_of

from fullft.config.config import Config
from fullft.memory import worst_step as worst_step_module
from fullft.memory.plan import Batch, plan_step
from fullft.memory.worst_step import take_worst_step
from fullft.model.loss import LossSum
from fullft.model.precision import autocast_of
from fullft.optim.adamw import AdamW
from fullft.storage.tiers import host_pieces

CPU = torch.device("cpu")


def train(model: PreTrainedModel, optimizer: AdamW, config: Config, steps: int) -> list[torch.Tensor]:
    """Some steps as train.py takes them, with dropout."""
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (2, 24), generator=random)
        with autocast_of(config.numerics, CPU):
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
def test_worst_step_leaves_the_run_bitwise_unchanged(
    options: dict[str, object], tmp_path: Path, small_chunks: int
) -> None:
    config = make_config(
        **options, activation_checkpointing="full", weight_decay=0.1, learning_rate=1e-3, output_dir=tmp_path
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
            take_worst_step(
                model,
                LossSum(model),
                optimizer,
                prepared[:count],
                prepared[0],
                autocast_of(config.numerics, CPU),
                config.max_grad_norm,
            )
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


def test_run_differs_unless_the_random_state_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    config = make_config(precision="fp32")
    losses = []
    for forked in (True, False):
        model = model_of("gpt2", config, dropout=0.1)
        optimizer = optimizer_of(model, config)
        prepared = [micro_batch(config, 24)]
        if not forked:
            monkeypatch.setattr(worst_step_module.torch.random, "fork_rng", lambda *_, **__: nullcontext())
        torch.manual_seed(5)
        take_worst_step(model, LossSum(model), optimizer, prepared, None, autocast_of(config.numerics, CPU), 1.0)
        losses += train(model, optimizer, config, steps=1)
    assert not torch.equal(*losses)


def test_failing_worst_step_leaves_no_trace() -> None:
    config = make_config(precision="fp32")
    model = model_of("llama", config)
    optimizer = optimizer_of(model, config)
    broken = micro_batch(config, 8)
    broken.labels[0, 3] = VOCABULARY  # no such class
    with pytest.raises(RuntimeError, match="out of bounds"):
        take_worst_step(model, LossSum(model), optimizer, [broken], None, autocast_of(config.numerics, CPU), 1.0)
    assert optimizer.num_steps == 0 and not any(piece.any() for piece in all_states(optimizer))
    assert optimizer.param_groups[0]["lr"] == config.learning_rate
    assert all(optimizer.gradients.of(parameter) is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# The vocabularies are of more chunks than are on their way at once: five and a half, and eight.
@pytest.mark.parametrize(
    ("optim", "offload", "layers", "vocabulary"),
    [
        ("adamw", "none", 2, 700),
        ("adamw_8bit", "none", 2, 700),
        ("adamw_8bit", "optimizer=host,gradients=host", 2, 700),
        ("adamw", "optimizer=disk,gradients=disk", 2, 700),
        *(
            pytest.param(optim, offload, 7, VOCABULARY, marks=pytest.mark.slow)
            for optim in ("adamw", "adamw_8bit")
            for offload in ("none", "optimizer=host,gradients=host", "optimizer=disk,gradients=disk")
        ),
    ],
)
def test_rehearsed_chunks_stand_for_all(
    optim: str, offload: str, layers: int, vocabulary: int, small_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes, by far fewer operators. The batch is small, so that the step takes most memory."""
    config, model_config, batch = make_config(optim=optim, offload=offload), deep("llama", layers), Batch(1, 4)
    model_config.vocab_size = vocabulary
    planned = plan_step(config, model_config, batch)

    class Performance:
        """The whole step, with the states in place."""

        def __init__(self, optimizer: AdamW) -> None:
            self._optimizer = optimizer

        def __enter__(self) -> AdamW:
            for parameter in self._optimizer.parameters:
                self._optimizer.states_of(parameter)
            return self._optimizer

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(worst_step_module, "Rehearsal", Performance)
    whole = plan_step(config, model_config, batch)
    # The norm also keeps 8 bytes for each chunk that it has squared, and for each row of the last one.
    numbers = whole["phases"].pop("optimizer_step") - planned["phases"].pop("optimizer_step")
    chunks = sum(-(-parameter.numel() // small_chunks) for parameter in tiny_model("llama").parameters())
    assert 0 <= numbers <= 2 * 2 * 8 * chunks and whole == planned
