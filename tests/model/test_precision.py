"""Master weights: 16 + 16 bits are all 32, and training with them is training fp32 weights whose bf16 copy computes."""

import itertools

import pytest
import torch
from models import VOCABULARY, make_config, optimizer_of, summed_loss, tiny_model
from torch import nn

from fullft.model.precision import join, round_stochastically, split
from fullft.optim.adamw import AdamW

HALF = 1 << 16
# Of fp32's lower half: none, the least, around the tie, the most, and some in between.
LOWER = [0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFE, 0xFFFF]


def every_number() -> torch.Tensor:
    """Each of the 2^16 upper halves with each of the lower ones: zeros, denormals, infinities and NaNs among them."""
    upper = torch.arange(HALF, dtype=torch.int64)[:, None] << 16
    return (upper | torch.tensor(LOWER)).flatten().to(torch.int32).view(torch.float32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def split_of(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, remainder = torch.empty(numbers.shape, dtype=torch.bfloat16), torch.empty(numbers.shape, dtype=torch.int16)
    split(numbers.clone(), weights, remainder)
    return weights, remainder


# ---------------------------------------------------------------------------------------------- the arithmetic


def test_splitting_and_joining_gives_back_every_bit() -> None:
    numbers = every_number()
    weights, remainder = split_of(numbers)
    joined = torch.empty_like(numbers)
    join(weights, remainder, joined)
    assert torch.equal(bits(joined), bits(numbers))
    # The negative control: without the remainder, or with it as an unsigned number, bits are lost.
    assert not torch.equal(bits(weights.float()), bits(numbers))
    unsigned = (bits(weights).int() << 16) + (remainder.int() & 0xFFFF)
    assert not torch.equal(unsigned, bits(numbers))


def test_the_weight_is_the_nearest_bf16_number_and_of_two_the_larger() -> None:
    numbers = every_number()
    numbers = numbers[~numbers.isnan()]
    weights, _ = split_of(numbers)
    is_tie = (bits(numbers) & 0xFFFF) == 0x8000
    cast = numbers.to(torch.bfloat16)
    assert torch.equal(bits(weights[~is_tie]), bits(cast[~is_tie]))
    larger = (bits(numbers[is_tie]) >> 16).to(torch.int16) + 1
    assert torch.equal(bits(weights[is_tie]), larger)
    assert not torch.equal(bits(weights[is_tie]), bits(cast[is_tie]))  # the even one, where torch's cast breaks ties
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert split_of(largest)[0].isinf().all()  # as in the cast; the master itself stays finite


def test_a_weight_of_another_rounding_would_be_noticed() -> None:
    """Cutting bits off, instead of rounding, is off by more than half a step for half of the numbers."""
    numbers = every_number()
    numbers = numbers[numbers.isfinite()]
    cut = (bits(numbers) >> 16).to(torch.int16).view(torch.bfloat16)
    wrong = bits(cut) != bits(split_of(numbers)[0])
    assert wrong.float().mean() > 0.4


AROUND = [1.001, -1.001, 3.14159, -0.3333333, 1e-30, -7.7e20, 2.0**-130 * 1.7, 255.5001, -(2.0**-140) * 1.3]


def test_stochastic_rounding_gives_a_neighbour_and_is_right_on_average() -> None:
    draws = 1 << 16
    numbers = torch.tensor(AROUND)
    weights = torch.empty(len(AROUND), draws, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    round_stochastically(numbers[:, None].repeat(1, draws), weights, generator)
    below = (bits(numbers) >> 16)[:, None]  # in magnitude
    steps = bits(weights).int() - below
    assert set(steps.unique().tolist()) <= {0, 1}
    expected = (bits(numbers) & 0xFFFF).double() / HALF
    found = steps.double().mean(1)
    bound = 5 * (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= bound).all()
    # The negative control: rounding to the nearest is far beyond that bound.
    nearest = (bits(numbers.to(torch.bfloat16)).int() - below[:, 0]).double()
    assert ((nearest - expected).abs() > bound).all()


def test_stochastic_rounding_leaves_bf16_numbers_alone() -> None:
    weights = torch.arange(HALF, dtype=torch.int64).to(torch.int16).view(torch.bfloat16)
    rounded = torch.empty_like(weights)
    for seed in range(3):
        round_stochastically(weights.float(), rounded, torch.Generator().manual_seed(seed))
        is_number = ~weights.isnan()
        assert torch.equal(bits(rounded[is_number]), bits(weights[is_number]))


# ---------------------------------------------------------------------------------------------- the trajectory

RATES = [1e-3, 2e-3, 5e-4, 1.7e-3]  # of the steps: a schedule that changes each time
DECAY = 0.1


def batches(count: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (2, 16), generator=random) for _ in range(count)]


def backward(model: nn.Module, ids: torch.Tensor) -> float:
    loss = summed_loss(model, ids) / 30
    loss.backward()
    return loss.item()


def nearest(master: torch.Tensor) -> torch.Tensor:
    """The nearest bf16 number, and of two the larger, by comparing distances in fp64."""
    down = (bits(master) >> 16 << 16).view(torch.float32)
    up = ((bits(master) >> 16) + 1 << 16).view(torch.float32)
    is_down = (master.double() - down.double()).abs() < (up.double() - master.double()).abs()
    return torch.where(is_down, down, up).to(torch.bfloat16)


def plain_torch(
    family: str, accumulation: int, max_norm: float, tied: bool
) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """Losses, norms and masters of torch's fused AdamW on fp32 weights, whose bf16 copy does forward and backward."""
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
    """The same by our optimizer."""
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
def test_split_masters_are_bitwise_fp32_weights_whose_bf16_copy_computes(
    family: str, tied: bool, accumulation: int, max_norm: float, small_chunks: int
) -> None:
    losses, norms, masters = plain_torch(family, accumulation, max_norm, tied)
    our_losses, our_norms, our_masters = ours(family, accumulation, max_norm, tied)
    assert our_losses == losses
    assert our_norms == pytest.approx(norms, rel=1e-12)
    assert all(torch.equal(our, their) for our, their in zip(our_masters, masters, strict=True))
    assert not max_norm or min(norms) > max_norm  # clipping clips


@pytest.mark.parametrize("masters", ["none", "stochastic"])
def test_other_masters_are_another_trajectory(masters: str) -> None:
    """The negative control."""
    losses, _, _ = plain_torch("llama", 1, 0.1, False)
    other_losses, _, _ = ours("llama", 1, 0.1, False, masters=masters)
    assert other_losses[0] == losses[0] and other_losses[-1] != losses[-1]


# ---------------------------------------------------------------------------------------------- small updates


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_an_update_of_a_millionth_vanishes_without_masters_only(optim: str) -> None:
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


def test_the_first_small_update_is_in_the_master_to_the_last_bit() -> None:
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
