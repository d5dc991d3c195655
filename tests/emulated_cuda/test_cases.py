"""The list of cases: it covers all pairs of choices that may stand together, and is not longer than it need be."""

import math

from emulated_cuda.cases import CHOICES, allowed_pairs, covering_cases, is_allowed, pairs_of


def test_cases_cover_all_allowed_pairs() -> None:
    cases = covering_cases()
    assert all(map(is_allowed, cases))
    assert {pair for case in cases for pair in pairs_of(case)} == allowed_pairs()
    # The negative control: without any one of them, some pair is missing.
    for dropped in cases:
        assert {pair for case in cases if case is not dropped for pair in pairs_of(case)} != allowed_pairs()


def test_cases_are_far_fewer_than_all() -> None:
    assert len(covering_cases()) < math.prod(map(len, CHOICES.values())) / 100
