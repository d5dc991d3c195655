"""Training with split masters is training fp32 weights whose bf16 copy computes."""

import itertools

import pytest
import torch
from models import VOCABULARY, make_config, optimizer_of, summed_loss, tiny_model
from torch import nn

from fullft.model.precision import join
from fullft.optim.adamw import AdamW

RATES = [1e-3, 2e-3, 5e-4, 1.7e-3]  # the learning rate of each step
DECAY = 0.1


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def batches(count: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (2, 16), generator=random) for _ in range(count)]


def backward(model: nn.Module, ids: torch.Tensor) -> float:
    loss = summed_loss(model, ids) / 30
    loss.backward()
    return loss.item()


def nearest(master: torch.Tensor) -> torch.Tensor:
    """Return the nearest bf16 number, the larger of two equally near ones, by distances in fp64."""
    down = (bits(master) >> 16 << 16).view(torch.float32)
    up = ((bits(master) >> 16) + 1 << 16).view(torch.float32)
    is_down = (master.double() - down.double()).abs() < (up.double() - master.double()).abs()
    return torch.where(is_down, down, up).to(torch.bfloat16)


def plain_torch(
    family: str, accumulation: int, max_norm: float, tied: bool
) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """Return losses, norms and masters of torch's fused AdamW on fp32 weights, whose bf16 copy computes."""
    model = tiny_model(family, torch.bfloat16, tied=tied)
    masters = [parameter.detach().float() for parameter in model.parameters()]
    decayed = [index for index, parameter in enumerate(model.parameters()) if parameter.ndim > 1]
    groups = [
        {"params": [m for i, m in enumerate(masters) if (i in decayed) is is_decayed], "weight_decay": decay}
        for is_decayed, decay in ((True, DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    losses, norms = [], []
    remaining = iter(batches(accumulation * len(RATES)))
    for rate in RATES:
        for master in masters:
            master.grad = torch.zeros_like(master)
        for ids in itertools.islice(remaining, accumulation):
            losses.append(backward(model, ids))
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad += parameter.grad.float()
                parameter.grad = None
        norm = torch.stack([(master.grad.double() ** 2).sum() for master in masters]).sum().sqrt()
        norms.append(norm.item())
        if max_norm:
            nn.utils.clip_grads_with_norm_(masters, max_norm, norm.float())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data.copy_(nearest(master))
    return losses, norms, masters


def masters_of(optimizer: AdamW, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    masters = []
    for parameter in parameters:
        master = torch.empty(parameter.numel())
        states = optimizer.states_of(parameter)
        if "remainder" in states:
            join(parameter.detach().view(-1), states["remainder"], master)
        else:
            master.copy_(parameter.detach().view(-1))
        masters.append(master.view(parameter.shape))
    return masters


def ours(
    family: str, accumulation: int, max_norm: float, tied: bool, masters: str = "split"
) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """Return the same of our optimizer."""
    model = tiny_model(family, torch.bfloat16, tied=tied)
    config = make_config(gradient_accumulation_steps=accumulation, master_weights=masters, weight_decay=DECAY)
    optimizer = optimizer_of(model, config)
    losses, norms = [], []
    remaining = iter(batches(accumulation * len(RATES)))
    for rate in RATES:
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses += [backward(model, ids) for ids in itertools.islice(remaining, accumulation)]
        norms.append(optimizer.clip_gradients(max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, masters_of(optimizer, list(model.parameters()))


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True)])
def test_split_masters_train_as_fp32_weights_do_bitwise(
    family: str, tied: bool, accumulation: int, max_norm: float, small_chunks: int
) -> None:
    losses, norms, masters = plain_torch(family, accumulation, max_norm, tied)
    our_losses, our_norms, our_masters = ours(family, accumulation, max_norm, tied)
    assert our_losses == losses
    assert our_norms == pytest.approx(norms, rel=1e-12)
    assert all(torch.equal(our, their) for our, their in zip(our_masters, masters, strict=True))
    assert not max_norm or min(norms) > max_norm  # clipping clips


@pytest.mark.parametrize("masters", ["none", "stochastic"])
def test_other_masters_follow_another_trajectory(masters: str) -> None:
    """The negative control."""
    losses, _, _ = plain_torch("llama", 1, 0.1, False)
    other_losses, _, _ = ours("llama", 1, 0.1, False, masters=masters)
    assert other_losses[0] == losses[0] and other_losses[-1] != losses[-1]


# ---------------------------------------------------------------------------------------------- small updates


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_update_of_a_millionth_vanishes_only_without_masters(optim: str) -> None:
    """Ones with a gradient of 1 lose the learning rate in each step, whatever the gradient's size."""
    steps, rate, count = 3000, 1e-6, 16384
    moved = {}
    for masters in ("split", "stochastic", "none"):
        model = nn.Linear(count // 64, 64, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(model.weight)
        config = make_config(optim=optim, master_weights=masters, learning_rate=rate)
        optimizer = optimizer_of(model, config)
        for _ in range(steps if masters == "split" else steps // 10):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        (master,) = masters_of(optimizer, [model.weight])
        moved[masters] = 1 - master.double().mean().item()
    assert moved["none"] == 0
    assert moved["split"] == pytest.approx(steps * rate, rel=0.02)  # fp32 next to 1 has steps of a seventeenth of it
    # Each step of a weight takes 1/256 away, with a probability of 256 rates.
    deviation = (steps / 10 * rate / 256 / count) ** 0.5
    assert moved["stochastic"] == pytest.approx(steps / 10 * rate, abs=5 * deviation)


def test_first_small_update_reaches_the_master_exactly() -> None:
    parameters = {}
    for masters, dtype in (("split", torch.bfloat16), ("fp32", torch.float32)):
        model = nn.Linear(8, 8, bias=False, dtype=dtype)
        nn.init.constant_(model.weight, 0.75)
        options = {"precision": "fp32"} if masters == "fp32" else {"master_weights": masters}
        optimizer = optimizer_of(model, make_config(**options, learning_rate=0.75e-6))
        model.weight.grad = torch.full_like(model.weight, 0.5)
        optimizer.step()
        (parameters[masters],) = masters_of(optimizer, [model.weight])
    assert torch.equal(parameters["split"], parameters["fp32"])
    assert (parameters["split"] < 0.75).all()
