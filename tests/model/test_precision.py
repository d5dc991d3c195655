"""Master weights: 16 + 16 bits hold all 32, and stochastic rounding is right on average."""

import torch

from fullft.model.precision import join, noise_for, round_stochastically, split

HALF = 1 << 16
# Of fp32's lower half: none, the least, around the tie, the most, and some in between.
LOWER = [0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFE, 0xFFFF]


def every_number() -> torch.Tensor:
    """Return each of the 2^16 upper halves with each lower one: zeros, denormals, infinities and NaNs too."""
    upper = torch.arange(HALF, dtype=torch.int64)[:, None] << 16
    return (upper | torch.tensor(LOWER)).flatten().to(torch.int32).view(torch.float32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def split_of(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, remainder = torch.empty(numbers.shape, dtype=torch.bfloat16), torch.empty(numbers.shape, dtype=torch.int16)
    split(numbers.clone(), weights, remainder)
    return weights, remainder


def test_split_then_join_returns_every_bit() -> None:
    numbers = every_number()
    weights, remainder = split_of(numbers)
    joined = torch.empty_like(numbers)
    join(weights, remainder, joined)
    assert torch.equal(bits(joined), bits(numbers))
    # The negative control: without the remainder, or with it as an unsigned number, bits are lost.
    assert not torch.equal(bits(weights.float()), bits(numbers))
    unsigned = (bits(weights).int() << 16) + (remainder.int() & 0xFFFF)
    assert not torch.equal(unsigned, bits(numbers))


def test_split_weight_is_the_nearest_bf16_number() -> None:
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


def test_truncated_weight_differs_from_the_nearest() -> None:
    """Cutting bits off, instead of rounding, is off by more than half a step for half of the numbers."""
    numbers = every_number()
    numbers = numbers[numbers.isfinite()]
    cut = (bits(numbers) >> 16).to(torch.int16).view(torch.bfloat16)
    wrong = bits(cut) != bits(split_of(numbers)[0])
    assert wrong.float().mean() > 0.4


AROUND = [1.001, -1.001, 3.14159, -0.3333333, 1e-30, -7.7e20, 2.0**-130 * 1.7, 255.5001, -(2.0**-140) * 1.3]


def test_stochastic_rounding_is_right_on_average() -> None:
    draws = 1 << 16
    numbers = torch.tensor(AROUND)
    weights = torch.empty(len(AROUND), draws, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    masters = numbers[:, None].repeat(1, draws)
    round_stochastically(masters, weights, noise_for(masters, generator))
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


def test_stochastic_rounding_keeps_bf16_numbers() -> None:
    weights = torch.arange(HALF, dtype=torch.int64).to(torch.int16).view(torch.bfloat16)
    rounded = torch.empty_like(weights)
    for seed in range(3):
        masters = weights.float()
        round_stochastically(masters, rounded, noise_for(masters, torch.Generator().manual_seed(seed)))
        is_number = ~weights.isnan()
        assert torch.equal(bits(rounded[is_number]), bits(weights[is_number]))
