"""How fast a machine is, and how long a step takes there; the slowest link sets the pace."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import make_config
from ranks import run_on_ranks
from worst_steps import deep

from fullft.config.config import Config
from fullft.config.ranks import Place
from fullft.memory import speeds as module
from fullft.memory.choose import Plans
from fullft.memory.plan import Batch
from fullft.memory.speeds import ASSUMED, measure_ring, measure_speeds
from fullft.memory.step_time import estimate_seconds
from fullft.memory.traffic import Traffic

CPU = torch.device("cpu")
BATCH = Batch(1, 8)


def placed(folder: Path, gpus: int, local_count: int) -> Config:
    config = make_config(gpus=gpus, shard="full", output_dir=folder)
    config.__dict__["place"] = Place(0, gpus, 0, local_count)
    return config


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that nothing measures."""
    monkeypatch.setattr(module, "_disk_speeds", lambda *_: (1.0, 2.0))
    monkeypatch.setattr(module, "training_flops_per_second", lambda *_: 8.0)
    monkeypatch.setattr(module, "sums_per_second", lambda _: 16.0)
    monkeypatch.setattr(module, "updates_per_second", lambda *_: 3.0)


@pytest.mark.usefixtures("known_rates")
def test_ring_is_as_fast_as_its_slowest_part(tmp_path: Path) -> None:
    within, across = (
        measure_speeds(placed(tmp_path, 4, local), deep("llama", 4), BATCH, CPU, ring=12.0) for local in (4, 2)
    )
    assert within.interconnect == 12 and (across.network, across.interconnect) == (6, module._GLOO)
    assert not within.overlaps and (within.disk_read, within.disk_write) == (1, 2)
    assert (within.flops, within.sums, across.flops, across.sums) == (2, 4, 4, 8)  # ranks of a CPU share it
    planned = replace(placed(tmp_path, 4, 4), plan=True, device_memory="80GiB")
    assert measure_speeds(planned, deep("llama", 4), BATCH, CPU) == ASSUMED and ASSUMED.overlaps


def test_all_ranks_measure_the_same_ring(tmp_path: Path) -> None:
    rates = run_on_ranks(2, lambda: measure_ring(make_config(shard="full", output_dir=tmp_path), CPU))
    assert len(rates) == 2 and rates[0] == rates[1] > 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_models_of_few_layers_are_timed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that are linear in the layers give the rate of the whole model, which is not built."""
    from fullft.memory import measured_work

    config, model_config, built = make_config(output_dir=tmp_path), deep(family, 64), list[int]()

    def seconds(_: Config, model: torch.nn.Module, sequences: int, length: int) -> float:
        built.append(len(model.model.layers))  # type: ignore[arg-type,union-attr]
        return sequences * length * (5.0 + built[-1])

    monkeypatch.setattr(measured_work, "_seconds_of_micro_batch", seconds)
    rate = measured_work.training_flops_per_second(config, model_config, Batch(2, 8), CPU)
    flops = Plans(model_config).facts(8).flops_per_token
    assert rate == pytest.approx(flops / (5.0 + 64), rel=1e-6)
    assert len(built) == 2 and max(built) < 64


def test_rates_are_measured(tmp_path: Path) -> None:
    """For real, in each number format: nothing is zero, and nothing is left behind."""
    for options in ({"precision": "fp32"}, {"precision": "bf16-true", "optim": "adamw_8bit"}):
        measured = measure_speeds(make_config(output_dir=tmp_path, **options), deep("llama", 4), BATCH, CPU)
        assert min(measured.flops, measured.link, measured.disk_read, measured.sums, measured.updates or 0) > 0
    assert list(tmp_path.iterdir()) == []


def test_too_large_layers_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a large product stands for the model."""
    monkeypatch.setattr("fullft.memory.measured_work._MOST_PARAMETERS", 10)
    assert measure_speeds(make_config(output_dir=tmp_path), deep("llama", 4), BATCH, CPU).flops > 0


def test_a_cpu_moves_bytes_instead_of_computing() -> None:
    """A card computes meanwhile; both wait for the slowest if that is the disk."""
    config = make_config(offload="optimizer=host,gradients=host", gradient_accumulation_steps=2)
    facts = Plans(deep("llama", 4)).facts(8)
    card = replace(ASSUMED, flops=1e9, link=1e7, sums=1e7, updates=1e7)
    cpu = replace(card, overlaps=False)
    onto, off = Traffic(to_device=3, from_device=2), Traffic(to_device=3, from_device=2, disk_read=3)
    assert onto.link_seconds(replace(card, link=1.0)) == 3 and onto.link_seconds(replace(cpu, link=1.0)) == 5
    assert off.link_seconds(replace(cpu, link=1.0)) == 2  # what is on disk is read into its place
    fast, slow = (estimate_seconds(config, facts, 8, speeds, 0.0) for speeds in (card, cpu))
    assert fast < slow
    stuck = replace(card, sums=1.0)
    seconds = config.gradient_accumulation_steps * facts.parameters
    assert estimate_seconds(config, facts, 8, stuck, 0.0) == pytest.approx(seconds, rel=0.01)
    alone = make_config(gradient_accumulation_steps=2)
    assert estimate_seconds(alone, facts, 8, stuck, 0.0) < 1  # nothing is summed on the host
