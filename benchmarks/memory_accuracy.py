"""Measure how accurate the memory figures are: planned, tracked, and seen by the operating system.

    python benchmarks/memory_accuracy.py            # all, some minutes on two cores
    python benchmarks/memory_accuracy.py --quick    # without SmolLM2 and the operating system
    python benchmarks/memory_accuracy.py --cost     # only the time that tracking takes

It prints two tables and a cost. The first table compares the plan (fake tensors) with the tracker (real ones), on small
models of six families with many combinations of options.

The second table does so for SmolLM2-135M, and adds the operating system's figure. Each case runs in a process of its
own. The process first takes the step of a smaller model, so that libraries load and thread pools start. Then it reads
its resident set, loads the model, and resets the high-water mark (by writing 5 to `/proc/self/clear_refs`). At last it
takes the worst step and reads `VmHWM`. glibc maps every tensor above 64 KiB by itself here, so that freed ones go back
at once. Otherwise gaps in the heap, which belong to no tensor, would count too. The last column has the same with glibc
as training sets it, where gaps are kept. Linux only.

The cost is that of tracking: the worst step of SmolLM2-135M's shape with random weights, tracked and untracked.
"""

# ruff: noqa: E402
import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.utils import logging

from fullft.attention.choice import attend_by_document
from fullft.config.config import Config, resolve
from fullft.config.options import Options
from fullft.cpu.kernel_caches import KERNEL_CACHES
from fullft.cpu.proc import memory_field
from fullft.cpu.reuse import reuse_memory
from fullft.data.micro_batch import MicroBatch
from fullft.memory import worst_step
from fullft.memory.plan import Batch, plan_step
from fullft.memory.profile import COMPONENTS
from fullft.memory.tracker import MemoryTracker
from fullft.memory.worst_step import take_worst_step
from fullft.model.bundled import bundled_config
from fullft.model.homes import move_layers_home
from fullft.model.loss import LossSum
from fullft.model.precision import autocast_of, dtype_of
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import Storage
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.streaming import apply_layer_streaming

SMOLLM2 = ROOT / "benchmarks" / "work" / "smollm2-135m"
# All but the smallest tensors get mappings of their own, and nothing freed is kept.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MIB = 2**20

Case = tuple[str, str, str, int, bool, str]  # precision, checkpointing, optimizer, accumulation, packing, offload
Figures = dict[str, Any]

# ---------------------------------------------------------------------------------------------- configurations

PRECISIONS = ("fp32", "bf16-mixed", "bf16-true")
OFFLOADS = (
    "none",
    "optimizer=host,gradients=host",
    "optimizer=disk,gradients=disk",
    "optimizer=disk,gradients=host,parameters=host",  # needs every layer checkpointed
)


def model_configs() -> dict[str, PreTrainedConfig]:
    """Describe small models, with megabytes of weights and activations. Gemma-2's layers are of two kinds, in turn."""
    shape = {"vocab_size": 8192, "num_key_value_heads": 2, "num_attention_heads": 4, "max_position_embeddings": 1024}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    small = {**shape, **tokens, "hidden_size": 256, "intermediate_size": 704}
    return {
        "gpt2": GPT2Config(vocab_size=8192, n_embd=320, n_layer=6, n_head=5, bos_token_id=0, eos_token_id=0),
        "llama": LlamaConfig(**small, num_hidden_layers=5),
        "mistral": MistralConfig(**small, num_hidden_layers=6, sliding_window=128),
        "qwen2": Qwen2Config(**small, num_hidden_layers=6, tie_word_embeddings=True),
        "gemma2": Gemma2Config(**small, num_hidden_layers=6, head_dim=64, sliding_window=128),
        "phi": PhiConfig(**small, num_hidden_layers=5, resid_pdrop=0.1),
    }


def combinations() -> list[Case]:
    """Vary the options together, so that each value meets most of the others in few runs."""
    modes = ["none", "full", "every_2", "selective"]
    cases = []
    for number, (precision, mode) in enumerate(itertools.product(PRECISIONS, modes)):
        turn = number + number // len(modes)  # so that a mode meets other values every time
        optim = ("adamw", "adamw_8bit")[turn % 2]
        accumulation, packing = ((1, False), (4, True), (4, False), (1, True))[turn % 4]
        offload = OFFLOADS[turn % 4] if mode == "full" else OFFLOADS[turn % 3]
        cases.append((precision, mode, optim, accumulation, packing, offload))
    return cases


def options(precision: str, mode: str, optim: str, accumulation: int, packing: bool, offload: str) -> Config:
    """Resolve the options of a case."""
    return resolve(
        Options(
            model="given",
            precision=precision,
            activation_checkpointing=mode,
            optim=optim,
            gradient_accumulation_steps=accumulation,
            packing=packing,
            offload=offload,
        )
    )


def micro_batch(config: Config, vocabulary: int, sequences: int, length: int) -> MicroBatch:
    """Make random tokens. A packed row holds two documents."""
    ids = torch.randint(0, vocabulary, (sequences, length))
    inputs = {"input_ids": ids}
    if config.packing:
        inputs["position_ids"] = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)]).repeat(
            sequences, 1
        )
    return MicroBatch(inputs, ids.clone(), ids.numel(), sequences * (length - 1))


def track(config: Config, model: PreTrainedModel, batch: Batch) -> Figures:
    """Take the worst step on real tensors.

    Args:
        config: the case's.
        model: with its weights; changed in place.
        batch: the largest micro-batches.
    """
    storage = Storage(model.device, ROOT)
    if config.placement.streams_layers:
        move_layers_home(model, config.placement.parameters, storage)
    attend_by_document(model)
    reuse_memory(model)
    apply_activation_checkpointing(model, config)
    apply_layer_streaming(model, storage)
    vocabulary = model.config.vocab_size
    profile = take_worst_step(
        model,
        LossSum(model),
        build_optimizer(model, config, storage),
        [micro_batch(config, vocabulary, batch.sequences, batch.length)] * min(2, config.gradient_accumulation_steps),
        micro_batch(config, vocabulary, batch.sequences, batch.evaluation_length),
        autocast_of(config.numerics, model.device),
        config.max_grad_norm,
    )
    return profile.to_dict()


# ---------------------------------------------------------------------------------------------- planned and tracked


def compare_plans() -> list[tuple[float, float, str]]:
    """Print the first table.

    Returns:
        For each configuration, the error at the peak, the largest error of a component, and that component's name.
    """
    print("Planned on fake tensors, tracked on real ones (MiB; errors in % of the tracked figure)")
    head = f"{'family':8} {'precision':10} {'ckpt':8} {'optimizer':11} acc pack {'offload':45}"
    print(f"{head}  planned  tracked    error  worst component")
    errors = []
    for (family, model_config), case in itertools.product(model_configs().items(), combinations()):
        config = options(*case)
        batch = Batch(sequences=2, length=384, evaluation_length=256)
        planned = plan_step(config, model_config, batch)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype_of(config.numerics.weights)).train()
        tracked = track(config, model, batch)
        worst, component = worst_component(planned, tracked)
        error = relative(planned["peak_bytes"], tracked["peak_bytes"])
        precision, mode, optim, accumulation, packing, offload = case
        print(
            f"{family:8} {precision:10} {mode:8} {optim:11} {accumulation:3} {'yes' if packing else 'no':4} "
            f"{offload:45}{planned['peak_bytes'] / MIB:9.2f}{tracked['peak_bytes'] / MIB:9.2f} {error:8.4%}  "
            + (f"{worst:.4%} {component}" if worst else "none: equal to the byte"),
            flush=True,
        )
        errors.append((error, worst, component))
    return errors


def worst_component(planned: Figures, tracked: Figures) -> tuple[float, str]:
    """Return the largest error of a component, relative to its own size, and that component's name.

    Each component counts twice, with its maximum and with its size at the peak.
    """
    kept = [(relative(planned[name], tracked[name]), name) for name in ("host_bytes", "disk_bytes")]
    return max(
        *kept,
        *(
            (relative(planned[kind][name], tracked[kind][name]), name)
            for kind in ("components", "at_peak")
            for name in COMPONENTS
        ),
    )


def relative(ours: int, truth: int) -> float:
    """Return |ours - truth| / truth, and 0 where both are 0."""
    return abs(ours - truth) / max(truth, 1)


# ---------------------------------------------------------------------------------------------- the operating system


def measure_growth(case: Case) -> None:
    """Print the figures of one case on SmolLM2 as JSON. It needs a process of its own."""
    config = options(*case)
    model_config = AutoConfig.from_pretrained(SMOLLM2) if SMOLLM2.is_dir() else smollm2_config()
    batch = Batch(sequences=1, length=512, evaluation_length=512)
    planned = plan_step(config, model_config, batch)
    dtype = dtype_of(config.numerics.weights)
    # Load and start whatever exists once per process, such as kernels, thread pools and their buffers.
    warm = LlamaConfig(**{**model_config.to_dict(), "num_hidden_layers": 1, "vocab_size": 4096})
    track(config, AutoModelForCausalLM.from_config(warm, dtype=dtype).train(), Batch(1, 512, 512))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that this step leaves for reuse would not count as growth
    before = memory_field("VmRSS") or 0
    if SMOLLM2.is_dir():
        model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=dtype).train()
    else:
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype).train()
    gc.collect()
    loaded = memory_field("VmRSS") or 0
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now the resident set
    started = time.perf_counter()
    tracked = track(config, model, batch)
    print(
        json.dumps(
            {
                "planned": planned,
                "tracked": tracked,
                "grown": (memory_field("VmHWM") or 0) - before,
                "loaded": loaded - before,
                "seconds": time.perf_counter() - started,
            }
        )
    )


def smollm2_config() -> LlamaConfig:
    """Return the bundled config, for random weights."""
    return LlamaConfig(**(bundled_config("HuggingFaceTB/SmolLM2-135M") or {}))


SMOLLM2_CASES: list[Case] = [
    ("fp32", "none", "adamw", 1, False, "none"),
    ("fp32", "full", "adamw", 4, False, "none"),
    ("bf16-mixed", "none", "adamw", 4, False, "none"),
    ("bf16-mixed", "full", "adamw", 1, True, "none"),
    ("bf16-true", "none", "adamw", 4, False, "none"),
    ("bf16-true", "full", "adamw_8bit", 4, True, "none"),
    ("bf16-true", "full", "adamw", 4, False, "optimizer=host,gradients=host"),
    ("bf16-true", "full", "adamw", 4, False, "optimizer=disk,gradients=disk"),
]


def compare_with_operating_system() -> dict[str, float]:
    """Print the second table.

    Returns:
        The largest error of the tracked peak, by optimizer.
    """
    origin = "its weights" if SMOLLM2.is_dir() else "random weights"
    print(f"\nSmolLM2-135M ({origin}), 1 x 512 tokens, {torch.get_num_threads()} threads (MiB)")
    head = f"{'precision':10} {'ckpt':6} {'optimizer':11} acc pack {'offload':40}"
    print(f"{head}  planned  tracked  process grew by  tracked off by  as in training")
    errors: dict[str, float] = {}
    for case in SMOLLM2_CASES:
        figures, in_training = _in_own_process(case, MALLOC), _in_own_process(case, KERNEL_CACHES)
        # On a CPU, memory of the host is the process's too.
        planned, tracked = (
            figures[each]["peak_bytes"] + figures[each]["host_bytes"] for each in ("planned", "tracked")
        )
        grown = figures["grown"]
        precision, mode, optim, accumulation, packing, offload = case
        print(
            f"{precision:10} {mode:6} {optim:11} {accumulation:3} {'yes' if packing else 'no':4} {offload:40}"
            f"{planned / MIB:9.1f}{tracked / MIB:9.1f}{grown / MIB:17.1f}{(tracked - grown) / grown:+16.2%}"
            f"{in_training['grown'] / MIB:16.1f}",
            flush=True,
        )
        errors[optim] = max(relative(tracked, grown), errors.get(optim, 0.0))
    return errors


def _in_own_process(case: Case, settings: dict[str, str]) -> Figures:
    """Measure one case under settings that libraries read from the environment."""
    command = [sys.executable, __file__, "--one", json.dumps(case)]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    figures: Figures = json.loads(result.stdout.splitlines()[-1])
    return figures


# ---------------------------------------------------------------------------------------------- what tracking costs

PAIRS = 5


class NoTracker:
    """Takes the tracker's place, and tracks nothing."""

    def __init__(self, *_: object) -> None:
        self.forward = self.backward = self.optimizer_step = self.evaluation = self.profile = lambda *_: None

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def measure_cost() -> None:
    """Print how long the worst step takes with and without the tracker: medians of steps that take turns.

    It measures processor time on one thread, where Python tracks. Other load on the machine does not count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = options("fp32", "none", "adamw", 1, False, "none")
    model = AutoModelForCausalLM.from_config(smollm2_config(), dtype=torch.float32).train()
    loss_sum, optimizer = LossSum(model), build_optimizer(model, config, Storage(model.device, ROOT))
    tokens = micro_batch(config, model.config.vocab_size, 1, 512)
    autocast = autocast_of(config.numerics, model.device)
    seconds: dict[str, list[float]] = {"tracked": [], "untracked": []}
    for number in range(PAIRS + 1):
        for name, tracker in (("untracked", NoTracker), ("tracked", MemoryTracker)):
            vars(worst_step)["MemoryTracker"] = tracker
            started = time.process_time()
            take_worst_step(model, loss_sum, optimizer, [tokens], tokens, autocast, config.max_grad_norm)
            if number:  # the first pair warms up
                seconds[name].append(time.process_time() - started)
    vars(worst_step)["MemoryTracker"] = MemoryTracker
    torch.set_num_threads(threads)
    print("\nThe worst step of SmolLM2-135M (random weights), fp32, 1 x 512 tokens, processor seconds on one thread")
    for name, each in seconds.items():
        print(f"  {name:10} median of {PAIRS} {statistics.median(each):6.2f}   {min(each):.2f} to {max(each):.2f}")
    tracked, untracked = (statistics.median(seconds[name]) for name in ("tracked", "untracked"))
    print(f"  tracking costs {tracked - untracked:+.2f} s, {tracked / untracked - 1:+.1%}")


def main() -> None:
    """Print both tables, the cost and the worst errors."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="leave out SmolLM2 and the operating system")
    parser.add_argument("--cost", action="store_true", help="measure only the time that tracking takes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    if arguments.one:
        return measure_growth(json.loads(arguments.one))
    if arguments.cost:
        return measure_cost()
    errors = compare_plans()
    grown = {} if arguments.quick else compare_with_operating_system()
    if not arguments.quick:
        measure_cost()
    print(f"\n{len(errors) + (len(SMOLLM2_CASES) if grown else 0)} configurations; the worst errors:")
    print(f"  planned against tracked, at the peak      {max(error for error, _, _ in errors):.4%}")
    worst, component = max((worst, component) for _, worst, component in errors)
    print(f"  planned against tracked, one component    {worst:.4%} ({component})")
    for optim, error in grown.items():
        print(f"  tracked against the operating system      {error:.2%} ({optim})")
    return None


if __name__ == "__main__":
    main()
