"""Placements: the words of `--offload`, and back."""

from itertools import product

import pytest

from fullft.config.placement import Placement, placements

TIERS = ("device", "host", "disk")


@pytest.mark.parametrize(("optimizer", "gradients", "parameters"), list(product(TIERS, (*TIERS, "released"), TIERS)))
def test_a_written_placement_reads_back_as_itself(optimizer: str, gradients: str, parameters: str) -> None:
    placement = Placement(optimizer, gradients, parameters)
    assert Placement.parse(str(placement)) == placement
    assert (str(placement) == "none") == ({optimizer, gradients, parameters} == {"device"})
    assert placement.streams_layers == (parameters != "device")


@pytest.mark.parametrize(
    ("words", "placement"),
    [
        ("none", Placement()),
        ("auto", Placement()),
        ("Optimizer=HOST", Placement(optimizer="host")),
        (" gradients=disk , parameters=host", Placement(gradients="disk", parameters="host")),
        ("optimizer=device", Placement()),
    ],
)
def test_words_are_read_as_a_placement(words: str, placement: Placement) -> None:
    assert Placement.parse(words) == placement


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("optimizer=paged", "'optimizer=paged' is neither none nor one of"),
        ("optimizer=released", "is neither none nor one of"),
        ("weights=host", "'weights=host' is neither"),
        ("", "'' is neither"),
        ("optimizer=host,optimizer=disk", "optimizer is placed twice"),
    ],
)
def test_words_that_place_nothing_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement.parse(words)


def test_offloaded_names_what_is_not_on_the_device() -> None:
    assert Placement("disk", "device", "host").offloaded == {"optimizer": "disk", "parameters": "host"}
    assert Placement("paged", "released").offloaded == {"gradients": "released"}


def test_placements_are_all_combinations_of_the_tiers() -> None:
    found = list(placements(("device", "host")))
    assert len(found) == len(set(found)) == 8
    assert all({each.optimizer, each.gradients, each.parameters} <= {"device", "host"} for each in found)
