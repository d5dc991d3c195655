"""What surrounds AdamW's kernel gives the same bits when it is compiled, in a third of the kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from fullft.optim.masters import narrow, widen
from fullft.transforms.compilation import fuse, fused

COUNTS = [1 << 12, 4096 + 37, 64]
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 3e38, -3e38, 1e-45, 2.0**-127, 1 + 2.0**-8, 1 - 2.0**-9]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def numbers(count: int, seed: int) -> torch.Tensor:
    """Make any bits but those of NaN, with the special ones among them."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed)).int()
    made = bits.view(torch.float32)
    made[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return torch.where(made.isnan(), 1.5, made)


def to_widen(count: int, masters: str) -> list[torch.Tensor | None]:
    remainder = torch.randint(-(2**15), 2**15, (count,)).short() if masters == "split" else None
    scale = torch.tensor(0.37) if masters != "none" else None
    weights, gradient = numbers(count, 1).bfloat16(), numbers(count, 2).bfloat16()
    return [weights, remainder, gradient, scale, torch.empty(count), torch.empty(count)]


def to_narrow(count: int, masters: str) -> list[torch.Tensor | None]:
    remainder = torch.empty(count, dtype=torch.int16) if masters == "split" else None
    noise = torch.randint(0, 1 << 16, (count,), dtype=torch.int32) if masters == "stochastic" else None
    return [numbers(count, 3), torch.empty(count, dtype=torch.bfloat16), remainder, noise]


def bits_of(arguments: list[torch.Tensor | None]) -> list[list[int]]:
    wide = {2: torch.int16, 4: torch.int32}
    return [each.view(wide[each.element_size()]).flatten().tolist() for each in arguments if each is not None]


def copied(arguments: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [each if each is None else each.clone() for each in arguments]


@pytest.mark.parametrize("masters", ["split", "stochastic", "none"])
@pytest.mark.parametrize(("function", "arguments_of", "kernels"), [(widen, to_widen, 2), (narrow, to_narrow, 1)])
def test_compiled_gives_the_same_bits_in_fewer_kernels(
    function: Callable[..., None],
    arguments_of: Callable[[int, str], list[torch.Tensor | None]],
    kernels: int,
    masters: str,
) -> None:
    compiled = fused(function, function)
    metrics.reset()
    for count in COUNTS:
        eager = arguments_of(count, masters)
        graph, before = copied(eager), bits_of(eager)
        function(*eager)
        compiled(*graph)
        if function is narrow:  # masters are overwritten with anything
            eager, graph = eager[1:], graph[1:]
        assert bits_of(eager) == bits_of(graph)
        assert bits_of(eager) != before
    assert metrics.generated_kernel_count == kernels  # for all sizes together


class Counted(TorchDispatchMode):
    """Counts operators that do something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("function", "arguments_of", "most"), [(widen, to_widen, 5), (narrow, to_narrow, 4)])
def test_eager_takes_several_kernels(
    function: Callable[..., None], arguments_of: Callable[[int, str], list[torch.Tensor | None]], most: int
) -> None:
    compiled, arguments = fused(function, function), arguments_of(64, "split")
    with Counted() as counted:
        compiled(*arguments)  # within a mode, such as the tracker's, nothing is compiled
    assert counted.kernels == most


def test_cpu_and_a_gpu_without_a_compiler_keep_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuse(widen, torch.device("cpu")) is widen
    monkeypatch.setattr("fullft.transforms.compilation._lack", lambda device: "triton")
    assert fuse(widen, torch.device("cuda")) is widen
    monkeypatch.setattr("fullft.transforms.compilation._lack", lambda device: "")
    assert fuse(widen, torch.device("cuda")) is not widen


def test_compiler_that_fails_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise TorchDynamoException("no ptxas")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    compiled = fused(narrow, narrow)
    for _ in range(2):
        arguments = to_narrow(64, "split")
        expected = copied(arguments)
        compiled(*arguments)
        narrow(*expected)  # type: ignore[arg-type]
        assert bits_of(arguments) == bits_of(expected)
    assert capsys.readouterr().out.count("`narrow` takes several kernels") == 1
