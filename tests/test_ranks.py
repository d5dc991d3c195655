"""What ranks tell each other."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fork_server import ForkServer
from models import make_config
from rank_jobs import Job
from ranks import run_on_ranks

from fullft.errors import DataError, FullftError, StoppedBySignal
from fullft.ranks import (
    by_each_rank,
    by_first_rank,
    describe_ranks,
    first_on_this_machine,
    max_over_ranks,
    require_same,
    sum_over_ranks,
    wait_for_all,
)

WORDS = """
import json
def note(text):
    with open("order", "a") as file:
        file.write(text)
    time.sleep(0.2)
    return rank

answers = {
    "sum": sum_over_ranks(torch.tensor([0.1, 1e8 * (rank - 1)])).tolist(),
    "max": max_over_ranks(rank * 7 % 5),
    "by_first": by_first_rank(lambda: f"from {rank}"),
    "first_here": first_on_this_machine(lambda: note(str(rank))),
    "is_first": is_first(),
}
require_same("the rows", "abc")
try:
    by_first_rank(lambda: 1 / rank)
except ZeroDivisionError as error:
    answers["error"] = str(error)
with open(f"answers-{rank}", "w") as file:
    json.dump(answers, file)
"""


def test_ranks_exchange_words(fork_server: ForkServer, tmp_path: Path) -> None:
    ended = Job(fork_server, tmp_path, WORDS, count=3).end()
    assert ended.codes == [0, 0, 0], ended.stderr
    answers = [json.loads((tmp_path / f"answers-{rank}").read_text()) for rank in range(3)]
    tenth = torch.tensor(0.1).double()
    for rank, found in enumerate(answers):
        assert found == {
            "sum": [(tenth + tenth + tenth).item(), 0.0],
            "max": 4,  # of 0, 2 and 4
            "by_first": "from 0",
            "first_here": rank,
            "is_first": rank == 0,
            "error": "division by zero",
        }
    order = (tmp_path / "order").read_text()
    assert order[0] == "0" and sorted(order) == ["0", "1", "2"]


def test_rank_with_other_data_is_named(fork_server: ForkServer, tmp_path: Path) -> None:
    ended = Job(fork_server, tmp_path, "require_same('the rows', 'abcd'[rank // 2])", count=4).end()
    assert ended.codes == [3, 3, 3, 3]
    assert ended.errors == ["error: rank 2 and rank 0 differ in the rows: 'b' is not 'a'"]


def test_one_rank_needs_no_others() -> None:
    assert by_first_rank(lambda: 3) == first_on_this_machine(lambda: 3) == max_over_ranks(3) == 3
    assert sum_over_ranks(torch.tensor(0.5)) == 0.5
    require_same("anything", 1)
    wait_for_all()
    with pytest.raises(DataError):
        by_first_rank(fail)


def fail() -> None:
    raise DataError("none")


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({}, []),
        ({"shard": "none"}, []),
        ({"shard": "full"}, ["--shard full saves nothing: there is one rank"]),
        ({"gpus": 4, "global_batch_size": 16}, ["4 ranks"]),
        ({"gpus": 4, "global_batch_size": 2}, ["4 ranks", "2 of 4 ranks have nothing to do in a step of 2 micro-ba"]),
        ({"gpus": 3, "global_batch_size": 16}, ["3 ranks", "16 micro-batches a step do not divide by 3 ranks: 2 of"]),
    ],
)
def test_idle_ranks_are_described(options: dict[str, object], lines: list[str]) -> None:
    found = describe_ranks(make_config(**options))
    assert len(found) == len(lines)
    assert all(line.startswith(expected) for line, expected in zip(found, lines, strict=True)), found


# ---------------------------------------------------------------------------------------------- results and errors


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
