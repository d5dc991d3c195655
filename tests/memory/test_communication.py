"""What ranks send by formula is what a plan counts, and the seconds are those of arithmetic."""

from dataclasses import asdict, replace

import pytest
from models import make_config
from worst_steps import deep

from fullft.config.config import Config
from fullft.config.ranks import Place
from fullft.memory.choose import Plans
from fullft.memory.collectives import Sent, sent_in_step
from fullft.memory.communication import estimate_sent, seconds_to_send, seconds_with_others
from fullft.memory.facts import Facts
from fullft.memory.plan import Batch
from fullft.memory.speeds import ASSUMED
from fullft.memory.traffic import held_bytes

STAGES = ("none", "optimizer", "gradients", "full")


def sent_by_formula(config: Config, facts: Facts) -> Sent:
    """Add up two micro-batches, which stand for a step."""
    parts = [
        sum(estimate_sent(config, facts, is_first=is_first, is_last=is_last), Sent())
        for is_first, is_last in ((True, False), (False, True))
    ]
    return sent_in_step(parts, config.gradient_accumulation_steps)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("full", {}),
        ("optimizer", {"shard_nodes": 1}),
        *(
            pytest.param(stage, options, marks=pytest.mark.slow)
            for stage in STAGES
            for options in ({"precision": "fp32"}, {"shard_nodes": 1}, {"master_weights": "none"})
        ),
    ],
)
def test_formulas_give_what_a_plan_counts(stage: str, options: dict[str, object]) -> None:
    config = make_config(plan=True, gpus=16, shard=stage, global_batch_size=64, **options)
    model_config = deep("llama", 4)  # whose rows 16 ranks share evenly, and 8 too
    plans = Plans(model_config)
    planned, facts = plans.of(config, Batch(1, 16)), plans.facts(16)
    assert planned["sent"] == asdict(sent_by_formula(config, facts))
    held = held_bytes(config, facts)
    # What is certain to be held is less than the peak.
    known = held_bytes(config, facts, planned["components"]["activations"])
    assert held["device"] < known["device"] <= planned["peak_bytes"]


def test_stages_send_what_the_paper_says() -> None:
    """ZeRO-1 and 2 send as much as data parallelism does, ZeRO-3 half as much again, if weights are as wide as sums."""
    config = make_config(plan=True, gpus=8, shard="none", precision="fp32", gradient_accumulation_steps=1)
    facts = Plans(deep("llama")).facts(16)

    def sent(stage: str) -> int:
        forward, backward = estimate_sent(replace(config, shard=stage), facts, is_first=True, is_last=True)
        return sum(asdict(forward + backward).values())

    all_reduced = sent("none")
    assert all_reduced == 2 * 7 * 4 * facts.parameters // 8
    assert sent("optimizer") == sent("gradients") == all_reduced
    # What is outside of the layers is gathered once.
    assert sent("full") == all_reduced + 7 * 4 * facts.layer_parameters // 8


def test_middle_micro_batches_count_as_often_as_they_come() -> None:
    first, last = Sent(all_gather=5), Sent(reduce_scatter=7)
    assert sent_in_step([first, last], 2) == sent_in_step([first, last], 6) == Sent(5, 7)
    each = Sent(5, 7, 2)
    assert sent_in_step([each], 1) == each and sent_in_step([each], 6) == Sent(30, 42, 12)
    assert sent_in_step([Sent(5, 7), Sent(0, 7)], 6) == Sent(5, 42)


def at(config: Config, **place: int) -> Config:
    """Put a config's ranks somewhere."""
    config.__dict__["place"] = Place(rank=0, count=config.gpus, local_rank=0, **place)
    return config


def test_seconds_follow_from_the_slowest_link() -> None:
    speeds = replace(ASSUMED, interconnect=100.0, network=10.0)
    sent = Sent(all_gather=1000, reduce_scatter=2000, all_reduce=500)
    within = at(make_config(gpus=8, shard="full"), local_count=8)
    assert seconds_to_send(Sent(1000, 2000), within, speeds) == pytest.approx(30)
    across = at(make_config(gpus=16, shard="full"), local_count=4)
    assert seconds_to_send(Sent(1000, 2000), across, speeds) == pytest.approx(3000 / 40)
    hybrid = at(make_config(gpus=16, shard="full", shard_nodes=1), local_count=4)
    assert seconds_to_send(sent, hybrid, speeds) == pytest.approx(3000 / 100 + 500 / 10)
    alike = at(make_config(gpus=16, shard="none"), local_count=4)
    assert seconds_to_send(Sent(all_reduce=500), alike, speeds) == pytest.approx(500 / 40)


def test_sending_hides_behind_computing() -> None:
    config = make_config(plan=True, gpus=8, shard="full", gradient_accumulation_steps=1)
    facts = Plans(deep("llama")).facts(16)
    sent = sum(estimate_sent(config, facts, is_first=True, is_last=True), Sent())
    total = (sent.all_gather + sent.reduce_scatter) / ASSUMED.interconnect
    waiting = seconds_with_others(config, facts, 1.0, 2.0, replace(ASSUMED, overlaps=False))
    hidden = seconds_with_others(config, facts, 1.0, 2.0, ASSUMED)
    assert waiting == pytest.approx(3 + total)
    # Embeddings and head come, and go, while nothing computes.
    rest = 1 - facts.layer_parameters / facts.parameters
    forward, backward = estimate_sent(config, facts, is_first=True, is_last=True)
    alone = rest * (forward.all_gather + backward.all_gather + backward.reduce_scatter) / ASSUMED.interconnect
    assert hidden == pytest.approx(3 + alone) and alone < total
    slow = replace(ASSUMED, interconnect=total * ASSUMED.interconnect / 100)
    assert seconds_with_others(config, facts, 1.0, 2.0, slow) == pytest.approx(100, rel=1e-3)
