"""What ranks exchange: results, and errors, which reach all of them."""

import pickle
from collections.abc import Callable

import pytest
import torch.distributed as dist
from ranks import run_on_ranks

from fullft.errors import FullftError, StoppedBySignal
from fullft.ranks import by_each_rank, by_first_rank


class UnpicklableError(Exception):
    """As libraries have them: made from other arguments than it keeps."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def outcome(exchange: Callable[..., object], failing: tuple[int, ...], error: Exception) -> object:
    """Return what a rank gets back where some ranks fail."""

    def work() -> int:
        if dist.get_rank() in failing:
            raise error
        return dist.get_rank()

    try:
        return exchange(work)
    except Exception as raised:
        return raised


def test_results_reach_all_ranks() -> None:
    assert by_each_rank(lambda: "alone") == ["alone"] and by_first_rank(lambda: "alone") == "alone"
    found = run_on_ranks(3, lambda: (by_each_rank(dist.get_rank), by_first_rank(dist.get_rank)))
    assert found == [([0, 1, 2], 0)] * 3


@pytest.mark.parametrize("exchange", [by_first_rank, by_each_rank])
def test_an_error_of_one_rank_reaches_all(exchange: Callable[..., object]) -> None:
    failing = (0,) if exchange is by_first_rank else (1, 2)
    found = run_on_ranks(3, outcome, exchange, failing, OSError(28, "No space left", "file"))
    assert [(type(each), each.errno, each.filename) for each in found] == [(OSError, 28, "file")] * 3
    found = run_on_ranks(3, outcome, exchange, failing, StoppedBySignal("stopped", 15))
    assert [(type(each), str(each), each.exit_code) for each in found] == [(StoppedBySignal, "stopped", 143)] * 3


def test_an_error_that_cannot_be_sent_is_told() -> None:
    """Else the other ranks would wait for it."""
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(UnpicklableError("hole", "file")))
    found = run_on_ranks(2, outcome, by_first_rank, (0,), UnpicklableError("hole", "file"))
    assert [type(each) for each in found] == [FullftError] * 2 and "hole in file" in str(found[1])
