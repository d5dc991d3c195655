"""What ranks tell each other."""

import json
from pathlib import Path

import pytest
import torch
from fork_server import ForkServer
from models import make_config
from rank_jobs import Job

from fullft.errors import DataError
from fullft.ranks import (
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
