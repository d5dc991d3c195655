"""A step with 8-bit moments is bitsandbytes' step, rounded to the nearest code, whatever the chunks."""

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fullft.errors import OptionsError
from fullft.optim import adamw_8bit
from fullft.optim.adamw_8bit import BLOCK, TILE, adamw_8bit_, code_books
from fullft.tracing import is_fake, tracing

CPU = torch.device("cpu")
CONSTANTS: dict[str, float] = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
SMALLEST = 3.3e-7  # the second moment's first code above 0, to which all that is below is rounded up
SIZES = [1, 255, 256, 257, 5000]


class Chunk:
    """Weights and states of `size` elements; gradients that differ in scale from block to block."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = 10 ** (-1 - 4 * torch.rand(-(-size // BLOCK), generator=self.generator))
        self.weights = torch.randn(size, generator=self.generator)
        self.states = [torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)]
        self.states += [torch.zeros(-(-size // BLOCK)), torch.zeros(-(-size // BLOCK))]

    def gradient(self) -> torch.Tensor:
        size = len(self.weights)
        return torch.randn(size, generator=self.generator) * self.scale.repeat_interleave(BLOCK)[:size]

    def copy(self) -> list[torch.Tensor]:
        return [self.weights.clone(), *(state.clone() for state in self.states)]


def step_ours(
    weights: torch.Tensor, gradient: torch.Tensor, states: list[torch.Tensor], step: int, **other: Any
) -> None:
    adamw_8bit_(weights, gradient, *states, step=step, **(CONSTANTS | other))


def step_theirs(weights: torch.Tensor, gradient: torch.Tensor, states: list[torch.Tensor], step: int) -> None:
    c = CONSTANTS
    bitsandbytes.functional.optimizer_update_8bit_blockwise(
        *("adam", gradient, weights, states[0], states[1], c["beta1"], c["beta2"], 0.0, 0.0, c["eps"], step, c["lr"]),
        *(*code_books(CPU), states[2], states[3], c["weight_decay"]),
    )


def decode(states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return both moments, and the scale of each element's blocks: [2, n]."""
    size = len(states[0])
    scales = torch.stack([absmax.double().repeat_interleave(BLOCK)[:size] for absmax in states[2:]])
    books = code_books(CPU)
    return books[0][states[0].int()] * scales[0], books[1][states[1].int()] * scales[1], scales


def nearest(values: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Search all codes, in float64."""
    return (values.double()[:, None] - book.double()).abs().argmin(1)


def require_plain_step(before: Chunk, gradient: torch.Tensor, after: list[torch.Tensor], step: int) -> None:
    """Compare with AdamW's formulas in float64, and the new states with the nearest codes."""
    c = CONSTANTS
    old1, old2, _ = decode(before.states)
    mean = c["beta1"] * old1 + (1 - c["beta1"]) * gradient.double()
    square = c["beta2"] * old2 + (1 - c["beta2"]) * gradient.double() ** 2
    denominator = (square / (1 - c["beta2"] ** step)).sqrt() + c["eps"]
    decayed = before.weights.double() * (1 - c["lr"] * c["weight_decay"])
    expected = decayed - c["lr"] / (1 - c["beta1"] ** step) * mean / denominator
    # Weights of fp32 are 2^-24 apart, relative; the update itself is as exact as a few operations in fp32.
    error = (after[0] - expected).abs()
    assert (error <= 2e-7 * expected.abs() + 2e-6 * (expected - decayed).abs()).all()
    for exact, codes, absmax, book in zip((mean, square), after[1:3], after[3:], code_books(CPU), strict=True):
        blocks = [block.abs().max() for block in exact.split(BLOCK)]
        torch.testing.assert_close(absmax.double(), torch.stack(blocks), rtol=1e-6, atol=0)
        scaled = exact / absmax.double().repeat_interleave(BLOCK)[: len(exact)]
        best = (book[nearest(scaled, book)] - scaled).abs()
        assert ((book[codes.int()] - scaled).abs() <= best + 1e-6 * scaled.abs() + SMALLEST).all()


def test_code_books_are_those_of_bitsandbytes() -> None:
    for book, signed in zip(code_books(CPU), (True, False), strict=True):
        assert torch.equal(book, bitsandbytes.functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_finds_the_nearest_code(signed: bool) -> None:
    book = code_books(CPU)[0 if signed else 1]
    generator = torch.Generator().manual_seed(0)
    boundaries = (book[:-1] + book[1:]) / 2
    values = torch.cat(
        [
            2 * torch.rand(20_000, generator=generator) - 1,
            10 ** (-8 * torch.rand(20_000, generator=generator)),
            -(10 ** (-8 * torch.rand(20_000, generator=generator))),
            *(boundaries, torch.nextafter(boundaries, torch.ones(())), torch.nextafter(boundaries, -torch.ones(()))),
            *(book, torch.tensor([0.0, -0.0, 1.0])),
        ]
    )
    values = values if signed else values.abs()
    bits = values.view(torch.int32)
    table = adamw_8bit._rounding_tables(CPU)[0 if signed else 1]
    codes = (adamw_8bit._round(bits, table) ^ (bits >> 31 if signed else 0)).to(torch.uint8).int()
    best = nearest(values, book)
    if not signed:
        best[(best == 0) & (values > 0)] = 1  # never rounded down to 0
    distance = (book[codes].double() - values).abs()
    # Where codes differ, the number lies on the boundary, up to its own rounding.
    assert (distance <= (book[best].double() - values).abs() + 2**-23 * values.abs()).all()
    assert (codes == best).float().mean() > 0.99
    # The control: the upper 16 bits alone are not enough.
    coarse = (table[(bits >> 16) & 0xFFFF] >> 16 ^ (bits >> 31 if signed else 0)).to(torch.uint8).int()
    assert (coarse == best).float().mean() < 0.99


@pytest.mark.parametrize("size", SIZES)
def test_steps_are_adamw_with_rounded_states(size: int) -> None:
    chunk = Chunk(size)
    for step in range(1, 6):
        gradient = chunk.gradient()
        after = chunk.copy()
        step_ours(after[0], gradient, after[1:], step)
        require_plain_step(chunk, gradient, after, step)
        for name, wrong in (("beta1", 0.901), ("beta2", 0.9991), ("lr", 1.001e-3)):
            other = chunk.copy()
            step_ours(other[0], gradient, other[1:], step, **{name: wrong})
            with pytest.raises(AssertionError):
                require_plain_step(chunk, gradient, other, step)
        chunk.weights, chunk.states = after[0], after[1:]


@pytest.mark.parametrize("size", [*SIZES, 100_000])
def test_each_step_equals_that_of_bitsandbytes(size: int) -> None:
    """Its table for the CPU, in steps of 2^-15, misses the nearest code here and there, and never betters ours."""
    chunk = Chunk(size)
    for step in range(1, 11):
        gradient = chunk.gradient()
        ours, theirs = chunk.copy(), chunk.copy()
        step_ours(ours[0], gradient, ours[1:], step)
        step_theirs(theirs[0], gradient, theirs[1:], step)
        torch.testing.assert_close(ours[0], theirs[0], rtol=2e-7, atol=2e-6 * CONSTANTS["lr"])
        old1, old2, _ = decode(chunk.states)
        exact1 = CONSTANTS["beta1"] * old1 + (1 - CONSTANTS["beta1"]) * gradient.double()
        exact2 = CONSTANTS["beta2"] * old2 + (1 - CONSTANTS["beta2"]) * gradient.double() ** 2
        for number, exact in ((1, exact1), (2, exact2)):
            torch.testing.assert_close(ours[2 + number], theirs[2 + number], rtol=1e-6, atol=0)
            scale = decode(ours[1:])[2][number - 1]
            error = (decode(ours[1:])[number - 1] - exact).abs() / scale
            their_error = (decode(theirs[1:])[number - 1] - exact).abs() / scale
            assert (error <= their_error + SMALLEST).all()
            assert (their_error <= error + 2**-15).all()
            # Where codes are far apart compared with 2^-15, they are the same but for a few neighbours.
            far_apart = exact.abs() > 0.1 * scale
            difference = (ours[number].int() - theirs[number].int()).abs()[far_apart]
            assert (difference <= 1).all() and difference.sum() <= 1 + 0.005 * size
        chunk.weights, chunk.states = theirs[0], theirs[1:]


def test_fifty_steps_stay_close_to_fp32_adamw() -> None:
    size, steps = 10_000, 50
    signal = torch.randn(size, generator=torch.Generator().manual_seed(1))

    def distance(kind: str) -> float:
        chunk = Chunk(size)
        weights, states = chunk.weights.clone(), chunk.states
        parameter = torch.nn.Parameter(chunk.weights.clone())
        names = {"lr": "lr", "eps": "eps", "weight_decay": "weight_decay"}
        betas = (CONSTANTS["beta1"], CONSTANTS["beta2"])
        exact = torch.optim.AdamW([parameter], betas=betas, **{key: CONSTANTS[name] for key, name in names.items()})
        for step in range(1, steps + 1):
            gradient = chunk.gradient() + signal * chunk.scale.repeat_interleave(BLOCK)[:size]
            parameter.grad = gradient
            exact.step()
            if kind == "theirs":
                step_theirs(weights, gradient, states, step)
            else:
                step_ours(weights, gradient, states, step, **({} if kind == "ours" else {"beta1": 0.8}))
        return float((weights - parameter.detach()).norm() / (parameter.detach() - chunk.weights).norm())

    ours = distance("ours")
    assert ours < 0.02  # of the way that fp32 AdamW went
    assert ours < 1.1 * distance("theirs")
    assert distance("wrong beta") > 0.04


def test_first_step_equals_that_of_fp32_adamw() -> None:
    chunk = Chunk(5000)
    gradient = chunk.gradient()
    parameter = torch.nn.Parameter(chunk.weights.clone())
    parameter.grad = gradient
    torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.01).step()
    step_ours(chunk.weights, gradient, chunk.states, 1)
    torch.testing.assert_close(chunk.weights, parameter.detach(), rtol=2e-7, atol=2e-9)


def test_chunks_cut_anywhere_equal_the_whole_bitwise() -> None:
    size = 2 * TILE + 5000  # two compiled tiles, one eager, one short block
    whole, parts = Chunk(size), Chunk(size)
    # Now whole tiles lie elsewhere, and most elements change between compiled and eager.
    cuts = [0, BLOCK, TILE // 2 + BLOCK, 2 * TILE - 3 * BLOCK, size]
    for step in (1, 2):
        gradient = whole.gradient()
        step_ours(whole.weights, gradient, whole.states, step)
        for start, end in zip(cuts, cuts[1:], strict=False):
            blocks = slice(start // BLOCK, -(-end // BLOCK))
            states = [state[start:end] for state in parts.states[:2]] + [absmax[blocks] for absmax in parts.states[2:]]
            step_ours(parts.weights[start:end], gradient[start:end], states, step)
    for one, other in zip(whole.copy(), parts.copy(), strict=True):
        assert torch.equal(one, other)
    # The control: a cut within a block does show.
    wrong = Chunk(size)
    step_ours(wrong.weights[:100], gradient[:100], [*(s[:100] for s in wrong.states[:2]), *wrong.states[2:]], 1)
    step_ours(wrong.weights[100:], gradient[100:], [*(s[100:] for s in wrong.states[:2]), *wrong.states[2:]], 1)
    right = Chunk(size)
    step_ours(right.weights, gradient, right.states, 1)
    assert not torch.equal(wrong.states[0], right.states[0])


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    caches = (adamw_8bit._compiled_update, adamw_8bit._rounding_tables, adamw_8bit.code_books)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_same_step_is_taken_without_a_compiler(fresh_caches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, eager = Chunk(TILE), Chunk(TILE)
    gradient = compiled.gradient()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # here it is compiled
        step_ours(compiled.weights, gradient, compiled.states, 1)

    def fail(*_: Any) -> None:
        raise RuntimeError("no C++ compiler")

    adamw_8bit._compiled_update.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        step_ours(eager.weights, gradient, eager.states, 1)
    for one, other in zip(compiled.copy(), eager.copy(), strict=True):
        assert torch.equal(one, other)


class Watch(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_step_is_the_same_under_a_dispatch_mode(fresh_caches: None) -> None:
    watched, compiled = Chunk(TILE), Chunk(TILE)
    for step in (1, 2):
        gradient = watched.gradient()
        with Watch():
            step_ours(watched.weights, gradient, watched.states, step)
        step_ours(compiled.weights, gradient, compiled.states, step)
    for one, other in zip(watched.copy(), compiled.copy(), strict=True):
        assert torch.equal(one, other)


def test_elements_without_a_gradient_stay() -> None:
    chunk = Chunk(700)
    gradient = chunk.gradient()
    gradient[:BLOCK] = 0  # a whole block
    gradient[300:310] = 0
    before = chunk.weights.clone()
    for step in range(1, 4):
        step_ours(chunk.weights, gradient, chunk.states, step, weight_decay=0.0)
    assert torch.equal(chunk.weights[:BLOCK], before[:BLOCK]) and torch.equal(chunk.weights[300:310], before[300:310])
    assert not torch.equal(chunk.weights[BLOCK:300], before[BLOCK:300])
    assert all(state.float().isfinite().all() for state in chunk.states)


def test_rare_gradient_does_not_make_weights_diverge(fresh_caches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second moment, tiny within its block, must not become 0 while the first does not."""

    def largest_move() -> float:
        weights = torch.zeros(BLOCK)
        states = Chunk(BLOCK).states
        for step in range(1, 6):
            gradient = torch.ones(BLOCK)
            gradient[0] = 3e-4 if step == 1 else 0.0
            before = weights.clone()
            step_ours(weights, gradient, states, step, weight_decay=0.0)
        return float((weights - before).abs().max() / CONSTANTS["lr"])

    assert largest_move() < 1.1
    book = code_books(CPU)[1]
    plain = adamw_8bit._rounding_table((book[:-1] + book[1:]) / 2)
    monkeypatch.setattr(
        adamw_8bit, "_rounding_tables", lambda device, old=adamw_8bit._rounding_tables: (old(device)[0], plain)
    )
    assert largest_move() > 100  # the control: plain rounding


def test_one_tile_stands_for_all_while_tracing(fresh_caches: None) -> None:
    def operators(size: int) -> int:
        with tracing():
            weights, gradient = torch.zeros(size + 5), torch.zeros(size + 5)
            states = [torch.zeros(size + 5, dtype=torch.uint8) for _ in range(2)]
            states += [torch.zeros(size // BLOCK + 1) for _ in range(2)]
            with Watch() as watch:
                step_ours(weights, gradient, states, 1)
        assert is_fake(weights)
        return watch.calls

    assert operators(1 << 28) == operators(TILE)
    assert not any(map(is_fake, (*code_books(CPU), *adamw_8bit._rounding_tables(CPU))))
    real = Chunk(300)
    before = real.weights.clone()
    step_ours(real.weights, real.gradient(), real.states, 1)
    assert not torch.equal(before, real.weights)


def test_cuda_without_bitsandbytes_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(OptionsError, match="pip install bitsandbytes"):
        adamw_8bit._bitsandbytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_step_on_cuda_equals_the_step_on_cpu() -> None:
    chunk = Chunk(5000)
    for step in range(1, 6):
        gradient = chunk.gradient()
        device = [tensor.cuda() for tensor in chunk.copy()]
        step_ours(device[0], gradient.cuda(), device[1:], step)
        step_ours(chunk.weights, gradient, chunk.states, step)
        # Its kernel decays after the update, and divides approximately.
        torch.testing.assert_close(device[0].cpu(), chunk.weights, rtol=1e-6, atol=1e-4 * CONSTANTS["lr"])
        for codes, ours in zip(device[1:3], chunk.states[:2], strict=True):
            assert (codes.cpu().int() - ours.int()).abs().max() <= 1
