"""Measure what each way to keep weights, gradients and states costs, in bytes and in time.

    python benchmarks/ladder.py               # all rungs, some ten minutes on two idle cores
    python benchmarks/ladder.py --only 8-bit  # those with this in their names, and those that they are compared with

It prints one table, for SmolLM2-135M's shape with random weights. Each way is a rung:

- Bytes per parameter on the device, the host and the disk are planned on fake tensors and tracked on real ones.
- The time of a step is relative to a rung that keeps everything on the device.
- What `--fit` estimates for a step is a share of the time that it took.
- Whether a rung is exact is checked on every bit of its weights, after two steps.

Steps are those of `train.py`, with full activation checkpointing. The rungs take turns, round after round, so that
other load on the machine slows all of them alike. Each is built anew every time. On a CPU the host's memory is the
device's. Here they are counted apart.
"""

# ruff: noqa: E402
import argparse
import gc
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from fullft.attention.choice import attend_by_document
from fullft.config.checks import find_problems
from fullft.config.config import Config, resolve
from fullft.config.options import Options
from fullft.data.micro_batch import GlobalBatch, MicroBatch
from fullft.memory.choose import step_seconds
from fullft.memory.facts import find_facts
from fullft.memory.plan import Batch, plan_step
from fullft.memory.speeds import measure_speeds
from fullft.memory.worst_step import take_worst_step
from fullft.model.bundled import bundled_config
from fullft.model.homes import move_layers_home
from fullft.model.loss import LossSum
from fullft.model.precision import autocast_of, dtype_of
from fullft.optim.adamw import AdamW
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import Storage, home_of, host_pieces
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.streaming import apply_layer_streaming

WORK = ROOT / "benchmarks" / "work"
MODEL = "HuggingFaceTB/SmolLM2-135M"
WARM_UP_TOKENS = 16  # of the first step, which makes states and compiles, at any length

# ---------------------------------------------------------------------------------------------- rungs

HOST = "optimizer=host,gradients=host,parameters=host"
DISK = "optimizer=disk,gradients=disk,parameters=disk"
CPU = torch.device("cpu")
LOST = "no: updates below 1/512 of a weight are lost"
ROUNDED = "no: moments are rounded to 8 bits"


@dataclass
class Rung:
    """One way to keep weights, gradients and states, and its measurements.

    Attributes:
        name: for the table.
        options: of `Options`.
        like: the rung whose trajectory this one must repeat to the bit; None for a trajectory of its own.
        exact: for a trajectory of its own, whether it is that of plain AdamW on fp32 weights.
        planned: figures of the worst step on fake tensors, in bytes.
        tracked: the same figures on real tensors.
        seconds: the time of a step, round by round.
        estimated: the same as `--fit` estimates it, with the machine's speeds measured just before.
        digest: the hash of all weights after two steps.
    """

    name: str
    options: dict[str, Any]
    like: str | None = None
    exact: str = "yes"
    planned: dict[str, Any] = field(default_factory=dict)
    tracked: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    estimated: list[float] = field(default_factory=list)
    digest: str = ""

    @property
    def config(self) -> Config:
        """The options, resolved."""
        shared: dict[str, Any] = {
            "gradient_accumulation_steps": 2,
            "activation_checkpointing": "full",
            "learning_rate": 1e-3,
        }
        options = Options(model="given", output_dir=WORK / "ladder", **(shared | self.options))
        problems = find_problems(options, {})
        assert not problems, problems
        return resolve(options)


def rungs() -> list[Rung]:
    """List the rungs, by family, from the most bytes on the device to the fewest."""
    split = {"precision": "bf16-true", "master_weights": "split"}
    eight, none = {**split, "optim": "adamw_8bit"}, {"precision": "bf16-true", "master_weights": "none"}
    once = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    stochastic = "no: rounds up or down at random; right on average"

    def offloaded(name: str, options: dict[str, Any], places: str, like: str) -> Rung:
        return Rung(f"{name}, {places}", {**options, "offload": places}, like)

    return [
        Rung("bf16-mixed", {"precision": "bf16-mixed"}),
        Rung("fp32", {"precision": "fp32"}),
        Rung("split", split),
        Rung("split 8-bit", eight, exact=ROUNDED),
        Rung("stochastic", {**split, "master_weights": "stochastic"}, exact=stochastic),
        Rung("none", none, exact=LOST),
        Rung("none 8-bit", {**none, "optim": "adamw_8bit"}, exact=LOST),
        offloaded("split", split, "optimizer=host", "split"),
        offloaded("split", split, "optimizer=host,gradients=host", "split"),
        offloaded("split", split, HOST, "split"),
        offloaded("split", split, DISK, "split"),
        offloaded("split 8-bit", eight, "optimizer=host", "split 8-bit"),
        offloaded("split 8-bit", eight, HOST, "split 8-bit"),
        offloaded("split 8-bit", eight, DISK, "split 8-bit"),
        Rung("split once", {**split, **once}),
        offloaded("split once", {**split, **once}, "gradients=released", "split once"),
        offloaded("split once", {**split, **once}, "gradients=released,optimizer=host,parameters=host", "split once"),
        Rung("split 8-bit once", {**eight, **once}, exact=ROUNDED),
        offloaded("split 8-bit once", {**eight, **once}, "gradients=released", "split 8-bit once"),
        offloaded(
            "split 8-bit once",
            {**eight, **once},
            "gradients=released,optimizer=disk,parameters=disk",
            "split 8-bit once",
        ),
        Rung(
            "none 8-bit once, gradients=released",
            {**none, **once, "optim": "adamw_8bit", "offload": "gradients=released"},
            exact=LOST,
        ),
    ]


def chosen(all_rungs: list[Rung], only: str) -> list[Rung]:
    """Return the rungs with a word in their names, and those that they are compared with."""
    names = {rung.name for rung in all_rungs if only in rung.name}
    names |= {str(rung.like) for rung in all_rungs if rung.name in names}
    names |= {time_base(rung) for rung in all_rungs if rung.name in names}
    return [rung for rung in all_rungs if rung.name in names]


def time_base(rung: Rung) -> str:
    """Return the name of the rung with as many micro-batches and everything on the device."""
    return "split once" if "once" in rung.name else "split"


# ---------------------------------------------------------------------------------------------- one rung


def build(config: Config, weights: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, AdamW]:
    """Build a model and its optimizer as `train.py` does.

    Args:
        config: the rung's.
        weights: fp32, under the parameters' names.
    """
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(model_config(), dtype=dtype_of(config.numerics.weights))
    model.tie_weights()
    model.load_state_dict(weights)
    model.train()
    storage = Storage(CPU, WORK)
    if config.placement.streams_layers:
        move_layers_home(model, config.placement.parameters, storage)
    attend_by_document(model)
    apply_activation_checkpointing(model, config)
    apply_layer_streaming(model, storage)
    return model, build_optimizer(model, config, storage)


def model_config() -> LlamaConfig:
    """Return the bundled config."""
    return LlamaConfig(**(bundled_config(MODEL) or {}))


def global_batch(config: Config, length: int) -> GlobalBatch:
    """Make micro-batches of random tokens, the same ones for every rung."""
    generator, vocabulary = torch.Generator().manual_seed(length), model_config().vocab_size
    count = config.gradient_accumulation_steps
    return GlobalBatch.of(
        [MicroBatch.of(torch.randint(0, vocabulary, (1, length), generator=generator)) for _ in range(count)]
    )


def take_step(loss_sum: LossSum, optimizer: AdamW, config: Config, length: int) -> None:
    """Take a step: parts 3 and 4 of `train.py`'s loop."""
    batch = global_batch(config, length)
    for micro_batch in batch:
        with autocast_of(config.numerics, CPU):
            micro_loss = loss_sum(micro_batch) / batch.num_target_tokens
        micro_loss.backward()
    optimizer.clip_gradients(max_norm=config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def visit(rung: Rung, weights: dict[str, torch.Tensor], length: int, is_first: bool) -> None:
    """Build a rung, take two steps, and measure the second one.

    Args:
        rung: gets another time; in the first round also its bytes and its digest.
        weights: those that it begins with.
        length: tokens of a micro-batch.
        is_first: whether this is the first round.
    """
    config = rung.config
    batch, facts = Batch(1, length), find_facts(model_config(), length)
    rung.estimated.append(step_seconds(config, facts, batch, measure_speeds(config, model_config(), batch, CPU)))
    model, optimizer = build(config, weights)
    loss_sum = LossSum(model)
    if is_first:
        rung.planned = plan_step(config, model_config(), Batch(1, length))
        micro_batches, autocast = list(global_batch(config, length)), autocast_of(config.numerics, CPU)
        profile = take_worst_step(model, loss_sum, optimizer, micro_batches, None, autocast, config.max_grad_norm)
        rung.tracked = profile.to_dict()
    take_step(loss_sum, optimizer, config, WARM_UP_TOKENS)
    start = time.perf_counter()
    take_step(loss_sum, optimizer, config, length)
    rung.seconds.append(time.perf_counter() - start)
    if is_first:
        rung.digest = digest(model, optimizer)
    optimizer.close()  # its hooks on the parameters would keep both alive for ever


def digest(model: PreTrainedModel, optimizer: AdamW) -> str:
    """Hash every weight, with the remainder of a split master."""
    total = hashlib.sha256()
    for parameter in model.parameters():
        states = optimizer.states_of(parameter)
        for array in [home_of(parameter), *([states["remainder"]] if "remainder" in states else [])]:
            for piece in host_pieces(array):
                total.update(piece.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------- the table

HEAD = ("rung", "device", "host", "disk", "device, planned", "peak", "planned", "time", "estimated", "exact")


def table(done: list[Rung], num_parameters: int) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows."""
    by_name = {rung.name: rung for rung in done}
    yield HEAD
    yield ("---", *["---:"] * 8, "---")
    for rung in done:
        tracked, planned = figures(rung.tracked), figures(rung.planned)
        cells = [f"{tracked[name] / num_parameters:.2f}" for name in ("device", "host", "disk")]
        cells += [f"{planned['device'] / num_parameters:.2f}", f"{tracked['peak'] / num_parameters:.2f}"]
        cells += [f"{planned['peak'] / num_parameters:.2f}"]
        ratio = statistics.median(rung.seconds) / statistics.median(by_name[time_base(rung)].seconds)
        estimates = [ours / real for ours, real in zip(rung.estimated, rung.seconds, strict=True)]
        cells += [f"{ratio:.2f}", f"{statistics.median(estimates):.2f}"]
        yield (rung.name.replace(", ", ",").replace(",", ", "), *cells, exactness(rung, by_name))


def figures(profile: dict[str, Any]) -> dict[str, int]:
    """Return the figures of a profile that the table shows, in bytes."""
    device = sum(profile["components"][name] for name in ("parameters", "gradients", "optimizer_states"))
    return {
        "device": device,
        "host": profile["host_bytes"],
        "disk": profile["disk_bytes"],
        "peak": profile["peak_bytes"],
    }


def exactness(rung: Rung, by_name: dict[str, Rung]) -> str:
    """Describe whether a rung trains as plain AdamW on fp32 weights does, or as the rung that it is compared with."""
    if rung.like is None:
        return rung.exact
    if rung.digest != by_name[rung.like].digest:
        return f"NO: DIFFERS from {rung.like}"
    return f"as {rung.like}, bit for bit"


def main() -> None:
    """Visit the rungs, round after round, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed steps of each rung; the table has their median (3)"
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a micro-batch (256)")
    parser.add_argument("--only", default="", help="rungs with this in their names (default: all)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    WORK.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(), dtype=torch.float32)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    del model
    done = chosen(rungs(), arguments.only)
    for number in range(arguments.rounds):
        for rung in done:
            visit(rung, weights, arguments.tokens, is_first=number == 0)
            gc.collect()
            print(
                f"round {number + 1}: {rung.seconds[-1]:6.2f} s, estimated {rung.estimated[-1]:6.2f} s  {rung.name}",
                flush=True,
            )
    print(
        f"\n{MODEL}'s shape, {num_parameters:,} parameters, random weights; 1 x {arguments.tokens} tokens, full "
        f"activation\ncheckpointing, {torch.get_num_threads()} threads.\n"
        "Bytes are per parameter, and tracked unless the column says planned. The device's are those of weights,\n"
        "gradients and states, each at its own maximum. The peak holds everything else too.\n"
        "The time of a step is relative to `split` (accumulation 2, clipping). For `once` it is relative to\n"
        f"`split once` (neither of the two). It is the median of {arguments.rounds}.\n"
        "`estimated` is the plan's estimate of a step, divided by what it took; the median as well.\n"
        "The embedding, 21% of the parameters, keeps fp32 moments in `8-bit` too.\n"
    )
    for cells in table(done, num_parameters):
        print(f"| {' | '.join(cells)} |")
    errors = {name: worst_error(done, name) for name in ("device", "host", "disk", "peak")}
    print("\nLargest error of the plan: " + ", ".join(f"{name} {error:.3%}" for name, error in errors.items()))
    if any("DIFFERS" in exactness(rung, {rung.name: rung for rung in done}) for rung in done):
        sys.exit("a rung differs from the one that it should equal: the column `exact` names it")


def worst_error(done: list[Rung], name: str) -> float:
    """Return the largest |planned - tracked| / tracked over the rungs."""
    pairs = [(figures(rung.planned)[name], figures(rung.tracked)[name]) for rung in done]
    return max(abs(planned - tracked) / max(tracked, 1) for planned, tracked in pairs)


if __name__ == "__main__":
    main()
