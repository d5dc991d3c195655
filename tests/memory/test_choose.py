"""The fastest exact choice that fits is taken, to the byte."""

from dataclasses import replace

import pytest
from models import make_config
from worst_steps import deep

from fullft.memory.choose import Plans, choices, choose
from fullft.memory.machine import Device, margin_bytes
from fullft.memory.plan import Batch
from fullft.memory.speeds import ASSUMED, Speeds


def with_margin(peak: int) -> int:
    """Return what a card must have for a planned peak."""
    return peak + margin_bytes(peak)


@pytest.mark.slow
def test_fastest_choice_that_fits_is_taken() -> None:
    """Each resident choice is taken down to the last byte with which it fits."""
    plans, batch, config = Plans(deep("llama", 2)), Batch(4, 256, 256), make_config()
    assert (config.activation_checkpointing, config.offload) == ("auto", "auto")
    resident = choices(replace(config, offload="none"), plans, batch, Device("mine", 0), ASSUMED)
    assert [choice.activation_checkpointing for choice in resident] == ["none", "selective", "full"]
    peaks = [plans.of(choice.apply(config), batch)["peak_bytes"] for choice in resident]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3

    def not_asked() -> Speeds:
        raise AssertionError("nothing needs to be measured")

    for choice, peak in zip(resident, map(with_margin, peaks), strict=True):
        chosen, line = choose(config, plans, batch, Device("mine", peak), not_asked)
        assert chosen == choice.apply(config)
        assert choice.describe() in line and "the fastest exact choice to fit mine" in line
        # One byte less, and it is no longer this one.
        assert choose(config, plans, batch, Device("mine", peak - 1), lambda: ASSUMED)[0] != chosen
    # Graphs recompute what is cheap in any case.
    compiled = replace(config, offload="none", compile="true")
    graphs = choices(compiled, plans, batch, Device("mine", 0), ASSUMED)
    assert [choice.activation_checkpointing for choice in graphs] == ["none", "every_2", "full"]
    assert [plans.of(choice.apply(compiled), batch)["peak_bytes"] for choice in (graphs[0], graphs[2])] == peaks[1:]
    asked = replace(config, activation_checkpointing="every_3", offload="none")
    assert choose(asked, plans, batch, Device("mine", 0), not_asked)[0] == asked
    off = make_config(fit="off")
    assert (off.activation_checkpointing, off.offload) == ("none", "none")


@pytest.mark.slow
def test_something_is_offloaded_below_the_resident_peaks() -> None:
    plans, batch, config = Plans(deep("llama", 4)), Batch(1, 16), make_config()
    full = replace(config, activation_checkpointing="full", offload="none")
    below = with_margin(plans.of(full, batch)["peak_bytes"]) - 1
    chosen, line = choose(config, plans, batch, Device("mine", below), lambda: ASSUMED)
    planned = plans.of(chosen, batch)
    assert "=host" in chosen.offload and with_margin(planned["peak_bytes"]) <= below and "on the host" in line
    # No faster one by estimate fits.
    ranked = choices(config, plans, batch, Device("mine", below), ASSUMED)
    for choice in ranked[: [choice.apply(config) for choice in ranked].index(chosen)]:
        assert with_margin(plans.of(choice.apply(config), batch)["peak_bytes"]) > below
    # Without host memory the disk remains; without a disk, nothing.
    chosen, _ = choose(config, plans, batch, Device("mine", below, host_bytes=0), lambda: ASSUMED)
    assert "disk" in chosen.offload and "host" not in chosen.offload
    assert with_margin(plans.of(chosen, batch)["peak_bytes"]) <= below
    nowhere = Device("mine", below, host_bytes=0, disk_bytes=0)
    assert "even that does not fit mine" in choose(config, plans, batch, nowhere, lambda: ASSUMED)[1]
    # What the user has set stays.
    asked = replace(config, offload="none")
    chosen, line = choose(asked, plans, batch, Device("mine", below), lambda: ASSUMED)
    assert chosen == full and "even that does not fit mine" in line


@pytest.mark.slow
def test_fastest_stage_that_fits_is_taken() -> None:
    """As if each were planned in turn, although most are passed over without a trace."""
    plans, batch = Plans(deep("llama", 5)), Batch(2, 128)
    config = make_config(plan=True, gpus=4, device_memory="1GiB")
    slow = replace(ASSUMED, flops=1e12, interconnect=2e9)  # there it matters what is sent
    ranked = choices(replace(config, offload="none"), plans, batch, Device("mine", 0), slow)
    assert {choice.shard for choice in ranked} == {"none", "optimizer", "gradients", "full"}
    assert not any(choice.placement.streams_layers for choice in choices(config, plans, batch, Device("", 0), slow))
    peaks = [with_margin(Plans(plans.model_config).peak_bytes(choice.apply(config), batch)) for choice in ranked]
    chosen = set()
    for size in sorted({*peaks, *(peak - 1 for peak in peaks)}):
        device = Device("mine", size, host_bytes=0, disk_bytes=0)
        expected = next((choice for choice, peak in zip(ranked, peaks, strict=True) if peak <= size), None)
        made, line = choose(replace(config, offload="none"), plans, batch, device, lambda: slow)
        if expected is None:
            assert "even that does not fit" in line and made.shard == "full"
        else:
            assert made == expected.apply(config) and f"shard {expected.shard}" in line
            chosen.add(expected.shard)
    assert chosen >= {"optimizer", "full"}


def test_stages_rank_by_what_is_slow() -> None:
    """Over a slow network as little as possible is sent; within a machine whole gradients cost more than sending."""
    plans, batch, device = Plans(deep("llama", 5)), Batch(1, 64), Device("mine", 2**40)
    config = make_config(plan=True, gpus=16, global_batch_size=64, activation_checkpointing="none", offload="none")

    def order(**speeds: float) -> list[str | None]:
        return [choice.shard for choice in choices(config, plans, batch, device, replace(ASSUMED, **speeds))]

    assert order(interconnect=1e6, network=1e6) == ["optimizer", "none", "gradients", "full"]
    assert order(interconnect=1e15, network=1e15, memory=1e9)[0] in ("gradients", "full")
