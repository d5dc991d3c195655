"""Arrays of every tier are filled and read alike; a weight's home is remembered as long as the weight lives."""

import gc
from pathlib import Path

import torch

from fullft.storage import tiers
from fullft.storage.tiers import Storage, fill, home_of, host_pieces, is_on_host, lives_elsewhere, set_home


def test_arrays_are_filled_and_read_piece_by_piece(tmp_path: Path) -> None:
    for tier in ("host", "disk"):
        array = Storage(torch.device("cpu"), tmp_path).zeros(tier, 5000, torch.bfloat16)
        assert not torch.cat([piece.clone() for piece in host_pieces(array)]).any()
        values = torch.randn(5000).bfloat16()
        fill(array, values)
        assert torch.equal(torch.cat([piece.clone() for piece in host_pieces(array)]), values)


def test_stretch_of_an_array_is_filled(tmp_path: Path, small_chunks: int) -> None:
    values = torch.randn(3 * small_chunks)
    for tier in ("device", "host", "disk"):
        array = Storage(torch.device("cpu"), tmp_path).zeros(tier, values.numel(), torch.float32)
        fill(array, values[small_chunks:], first=small_chunks)
        found = torch.cat([piece.clone() for piece in host_pieces(array)])
        assert not found[:small_chunks].any() and torch.equal(found[small_chunks:], values[small_chunks:])


def test_only_the_host_tier_counts_as_host(tmp_path: Path) -> None:
    storage = Storage(torch.device("cpu"), tmp_path)
    kinds = {tier: storage.zeros(tier, 10, torch.float32) for tier in ("device", "paged", "host")}
    found = {tier: is_on_host(array) for tier, array in kinds.items() if isinstance(array, torch.Tensor)}
    assert found == {"device": False, "paged": False, "host": True}


def test_home_is_forgotten_with_its_weight(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    assert home_of(weight) is weight and not lives_elsewhere(weight)
    home = Storage(torch.device("cpu"), tmp_path).zeros("host", 3, torch.float32)
    set_home(weight, home)
    assert home_of(weight) is home and lives_elsewhere(weight)
    count = len(tiers._HOMES)
    del weight
    gc.collect()
    assert len(tiers._HOMES) == count - 1
