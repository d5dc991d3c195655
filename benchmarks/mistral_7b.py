"""Every parameter of a Mistral-7B trained on a machine of 24 GiB: how much memory that takes, and where the time goes.

    python benchmarks/mistral_7b.py                      # both modes: 80 GB of free disk, half an hour on two cores
    python benchmarks/mistral_7b.py --weights streamed   # the weights on disk too
    python benchmarks/mistral_7b.py --size tiny          # the same with a model of a few MB, in seconds

Owns a checkpoint of random bf16 weights in the model's shape, which it deletes afterwards, whatever happens; training
steps that are taken as `train.py` takes them, in a process of its own per mode; and the limit that the machine sets:
its matrix products, its optimizer arithmetic and its disk, measured in the same run. Every step learns the same rows,
so the loss must fall; every parameter is then compared with what it was. Linux only. GiB is 2^30 bytes, GB is 10^9.
"""

# ruff: noqa: E402
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

_STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from fullft.memory.proc import memory_field

GIB, GB = 2**30, 10**9


class Sampler(threading.Thread):
    """Reads the process's anonymous memory every 50 ms, from its very start: weights mapped from a file may come back.

    `VmHWM`, the operating system's own high-water mark, also counts pages of files.
    """

    def __init__(self) -> None:
        """Start at once."""
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.phase = "start"
        self.start()

    def run(self) -> None:
        """Sample for as long as the process lives."""
        while True:
            self.sample()
            time.sleep(0.05)

    def sample(self) -> None:
        """Look once."""
        phase = self.phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), memory_field("RssAnon"))


SAMPLER = Sampler()  # before anything is imported that takes memory

import argparse
import hashlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from queue import SimpleQueue

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel
from transformers.utils import logging

from fullft.attention.documents import apply_document_attention
from fullft.config.config import Config
from fullft.config.parse import parse_config
from fullft.config.placement import parse_offload
from fullft.data.micro_batch import MicroBatch
from fullft.model.checks import require_fit
from fullft.model.configs import bundled_config
from fullft.model.load import load_model
from fullft.model.loss import SummedCrossEntropy
from fullft.model.parts import decoder_layers
from fullft.model.precision import join
from fullft.model.source import find_model
from fullft.optim.adamw import AdamW, state_layout
from fullft.optim.build import build_optimizer, build_schedule, moments_of
from fullft.storage.tiers import CHUNK, DiskArray, Storage, home_of, host_pieces
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.streaming import apply_layer_streaming

WORK = ROOT / "benchmarks" / "work"
MODEL = "mistralai/Mistral-7B-v0.1"
ACCUMULATION = 2
LEARNING_RATE = 1e-4
SPARE = 3 * GB  # of disk, left to others
PLACES = {
    "resident": "optimizer=disk,gradients=disk",
    "streamed": "optimizer=disk,gradients=disk,parameters=disk",
}


@dataclass(frozen=True)
class Size:
    """A model in Mistral's shape.

    Attributes:
        changes: to the bundled config.
        tokens: of a micro-batch.
        probe: bytes of the file that the disk's rates are measured on.
    """

    changes: dict[str, int]
    tokens: int
    probe: int


_TINY = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4}
_TINY |= {"num_attention_heads": 8, "num_key_value_heads": 2}
SIZES = {
    "7b": Size({}, 256, 4 * GIB),
    "1b": Size({"num_hidden_layers": 4}, 256, 2 * GIB),
    "tiny": Size(_TINY, 32, 2**26),
}

# ---------------------------------------------------------------------------------------------- the checkpoint


def model_config(size: str) -> MistralConfig:
    """Give the bundled config, in one of the sizes."""
    return MistralConfig(**{**(bundled_config(MODEL) or {}), **SIZES[size].changes})


def outline(size: str) -> PreTrainedModel:
    """Build the model without bytes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(size), dtype=torch.bfloat16)


def initial_pieces(name: str, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Make a parameter's first values, piece by piece, and the same ones each time.

    Args:
        name: of the parameter, which seeds them.
        parameter: its shape counts: norms begin as ones.

    Yields:
        [at most `CHUNK`] bf16.
    """
    for start in range(0, parameter.numel(), CHUNK):
        piece = torch.ones(min(CHUNK, parameter.numel() - start), dtype=torch.bfloat16)
        if parameter.dim() > 1:
            seed = int.from_bytes(hashlib.blake2b(f"{name} {start}".encode(), digest_size=7).digest(), "little")
            piece.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        yield piece


def write_checkpoint(folder: Path, size: str) -> None:
    """Write config and weights, one piece of a tensor in memory at a time.

    Args:
        folder: new.
        size: a key of `SIZES`.
    """
    folder.mkdir(parents=True)
    parameters = dict(outline(size).named_parameters())
    model_config(size).save_pretrained(folder)
    shards = split_torch_state_dict_into_shards(parameters, max_shard_size="5GB")
    for file, names in shards.filename_to_tensors.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + 2 * parameters[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(parameters[name].shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as content:
            content.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for piece in initial_pieces(name, parameters[name]):
                    content.write(piece.view(torch.uint8).numpy().data)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def require_disk(size: str, weights: str, folder: Path) -> None:
    """Say what a mode needs of the disk, and end if it is not there.

    Args:
        size: a key of `SIZES`.
        weights: a key of `PLACES`.
        folder: on the disk.
    """
    model = outline(size)
    config = options(size, weights, folder, 1)
    count = sum(parameter.numel() for parameter in model.parameters())
    states = {"moments": 0, "remainders": 0}
    for parameter in model.parameters():
        for name, (numel, dtype) in state_layout(parameter, moments_of(model, config)(parameter), "split").items():
            states["remainders" if name == "remainder" else "moments"] += numel * dtype.itemsize
    needs = {"source": 2 * count, **states, "fp32 gradients": 4 * count}
    total = sum(needs.values())
    if weights == "streamed":
        needs["weights' homes"] = homes = 2 * sum(each.numel() for each in decoder_layers(model).parameters())
        # The source goes as soon as the weights are at home; states and gradients come after that.
        total = max(needs["source"] + homes, total - needs["source"] + homes)
    free = shutil.disk_usage(folder.parent).free
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in needs.items())
    deleted = "; the source is deleted once it is loaded" if weights == "streamed" else ""
    print(f"Disk: {total / GB:.1f} GB at most ({parts}{deleted}); {free / GB:.1f} GB are free", flush=True)
    if free < total + SPARE:
        sys.exit(
            f"{folder.parent} needs {(total + SPARE - free) / GB:.1f} GB more free space, {SPARE / GB:.0f} to spare"
        )


# ---------------------------------------------------------------------------------------------- phases


def io_bytes() -> tuple[int, int]:
    """Give what this process has had read from and written to the disk so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


@dataclass
class Phase:
    """What one part of a step took: seconds, the process's seconds on all cores, and bytes from and to the disk."""

    seconds: float = 0.0
    cpu: float = 0.0
    read: int = 0
    written: int = 0


@contextmanager
def measured(name: str) -> Iterator[Phase]:
    """Measure the body; peaks of memory go to the sampler, under the phase's name."""
    phase, SAMPLER.phase = Phase(), name
    (read, written), start, cpu = io_bytes(), time.perf_counter(), time.process_time()
    yield phase
    phase.seconds, phase.cpu = time.perf_counter() - start, time.process_time() - cpu
    SAMPLER.sample()
    phase.read, phase.written = (after - before for after, before in zip(io_bytes(), (read, written), strict=True))
    SAMPLER.phase = "between"


# ---------------------------------------------------------------------------------------------- training


def options(size: str, weights: str, folder: Path, steps: int) -> Config:
    """Make the options, as a command line for `train.py` would."""
    flags = ["--model", str(folder), "--output_dir", f"{folder}-out", "--max_steps", str(steps)]
    flags += ["--precision", "bf16-true", "--master_weights", "split", "--optim", "adamw_8bit"]
    flags += ["--activation_checkpointing", "full", "--offload", PLACES[weights]]
    flags += ["--gradient_accumulation_steps", str(ACCUMULATION), "--max_length", str(SIZES[size].tokens)]
    flags += ["--learning_rate", str(LEARNING_RATE), "--lr_scheduler_type", "constant", "--max_grad_norm", "1.0"]
    return parse_config(flags)


def rows(vocabulary: int, tokens: int) -> list[MicroBatch]:
    """Make the micro-batches of every step: random tokens, all of them targets."""
    ids = torch.randint(0, vocabulary, (ACCUMULATION, 1, tokens), generator=torch.Generator().manual_seed(0))
    return [MicroBatch({"input_ids": each}, each.clone(), tokens, tokens - 1) for each in ids]


def train(size: str, weights: str, folder: Path, steps: int) -> None:
    """Load, train, check and report; runs in a process of its own.

    Args:
        size: a key of `SIZES`.
        weights: a key of `PLACES`.
        folder: of the checkpoint.
        steps: optimizer steps.
    """
    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = options(size, weights, folder, steps)
    with measured("loading") as loading:
        storage = Storage(torch.device("cpu"), folder.parent)
        model = load_model(config, find_model(config), storage)
        apply_document_attention(model)
        apply_activation_checkpointing(model, config)
        apply_layer_streaming(model)
    if weights == "streamed":
        shutil.rmtree(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters loaded in {loading.seconds:.0f} s", flush=True)
    batches = rows(model.config.vocab_size, SIZES[size].tokens)
    require_fit(model, model.config.vocab_size - 1, SIZES[size].tokens, packing=False)
    optimizer = build_optimizer(model, config, storage)
    learning_rate_at = build_schedule(config, steps)
    taken = []
    losses = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        phases, loss, norm = take_step(model, optimizer, batches, config)
        taken.append(phases)
        losses.append(loss)
        seconds = ", ".join(f"{name} {phase.seconds:.1f}" for name, phase in phases.items())
        print(f"step {step}: loss {loss:.4f}, gradient norm {norm:.3f}; seconds: {seconds}", flush=True)
    with measured("checking"):
        lines = check_moved(model, optimizer, batches)
    print("\n".join(lines))
    report_memory()
    counted = count_bytes(model, optimizer, parse_offload(config.offload))
    results = [{name: (vars(phase), counted[name]) for name, phase in phases.items()} for phases in taken]
    results_file(folder).write_text(json.dumps(results))
    if steps > 1 and not losses[-1] < losses[0]:
        sys.exit("the loss has not fallen")


def results_file(folder: Path) -> Path:
    """Give the file in which a mode's process leaves what it has measured."""
    return folder.parent / f"{folder.name}.json"


def take_step(
    model: PreTrainedModel, optimizer: AdamW, micro_batches: list[MicroBatch], config: Config
) -> tuple[dict[str, Phase], float, float]:
    """Take a step: `train.py`'s loop, parts 3 and 4.

    Returns:
        What its phases took, the loss, and the gradients' norm.
    """
    num_target_tokens = sum(micro_batch.num_target_tokens for micro_batch in micro_batches)
    phases: dict[str, Phase] = {}
    loss, summed_cross_entropy = torch.zeros(()), SummedCrossEntropy(model)
    with measured("forward and backward") as phases["forward and backward"]:
        for micro_batch in micro_batches:
            outputs = summed_cross_entropy.decoder(**micro_batch.inputs, use_cache=False)
            micro_loss = summed_cross_entropy(outputs, micro_batch) / num_target_tokens
            del outputs
            micro_loss.backward()
            loss += micro_loss.detach()
    with measured("clipping") as phases["clipping"]:
        norm = optimizer.clip_gradients(max_norm=config.max_grad_norm)
    with measured("optimizer step") as phases["optimizer step"]:
        optimizer.step()
        optimizer.zero_grad()
    return phases, float(loss), float(norm)


@torch.no_grad()
def check_moved(model: PreTrainedModel, optimizer: AdamW, micro_batches: list[MicroBatch]) -> list[str]:
    """Compare every master weight with what it was in the checkpoint, which is made once more.

    Returns:
        What was found, as lines.

    Raises:
        SystemExit: a parameter has not moved as it should.
    """
    # The last token of a row predicts nothing, and no other sees it.
    seen = torch.cat([micro_batch.inputs["input_ids"][:, :-1].flatten() for micro_batch in micro_batches]).unique()
    embeddings = model.get_input_embeddings().weight
    shares: dict[str, float] = {}
    farthest = 0.0
    for name, parameter in model.named_parameters():
        pairs = zip(
            initial_pieces(name, parameter),
            _flat_pieces(home_of(parameter)),
            _flat_pieces(optimizer.states_of(parameter)["remainder"]),
            strict=True,
        )
        moved = 0
        for initial, weights, remainder in pairs:
            master = torch.empty(weights.numel())
            join(weights, remainder, master)
            distance = master.sub_(initial).abs_()
            moved += int(distance.count_nonzero())
            farthest = max(farthest, float(distance.max()))
        shares[name] = moved / (len(seen) * parameter.shape[1] if parameter is embeddings else parameter.numel())
    least = min(shares, key=shares.__getitem__)
    if not 0.9 < shares[least] <= 1:
        sys.exit(f"{shares[least]:.2%} of {least} have moved")
    return [
        f"All {len(shares)} tensors have moved: of each at least {shares[least]:.4%} of its elements ({least}),",
        f"by at most {farthest:.2e}; of the embeddings the {len(seen)} rows that are predicted from",
    ]


def _flat_pieces(array: torch.Tensor | DiskArray) -> Iterator[torch.Tensor]:
    for piece in host_pieces(array):
        yield from piece.view(-1).split(CHUNK)


# ---------------------------------------------------------------------------------------------- the limit


@dataclass(frozen=True)
class Matrix:
    """A weight that multiplies every token.

    Attributes:
        shape: [out, in].
        forwards: how often per micro-batch: once more where backward recomputes it.
    """

    shape: tuple[int, int]
    forwards: int


def matrices(model: PreTrainedModel) -> list[Matrix]:
    """List the matrices. Recomputation stops before a layer's last one, whose output backward never asks for."""
    found = []
    for layer in decoder_layers(model):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        found += [Matrix(tuple(each.weight.shape), 1 if each is linears[-1] else 2) for each in linears]
    return [*found, Matrix(tuple(model.get_output_embeddings().weight.shape), 1)]


def flops(shapes: list[Matrix], tokens: int) -> float:
    """Count the operations on so many tokens: per weight and token 2 in forward, 4 in backward, 2 if recomputed."""
    return float(sum(2 * (matrix.forwards + 2) * matrix.shape[0] * matrix.shape[1] * tokens for matrix in shapes))


@dataclass(frozen=True)
class Rates:
    """What this machine can do at most.

    Attributes:
        products: per shape, seconds of the forward product and of both of backward.
        read: from the disk, bytes per second.
        write: to the disk.
        step: the optimizer's, with everything in memory, parameters per second.
        norm: of gradients in memory, parameters per second.
        gather: of adding a bf16 gradient to an fp32 sum in memory, by way of a buffer, parameters per second.
    """

    products: dict[tuple[int, int], tuple[float, float]]
    read: float
    write: float
    step: float
    norm: float
    gather: float

    def best(self, other: "Rates") -> "Rates":
        """Take the better of two measurements, each for itself."""
        products = {
            shape: (min(forward, other.products[shape][0]), min(backward, other.products[shape][1]))
            for shape, (forward, backward) in self.products.items()
        }
        names = ("read", "write", "step", "norm", "gather")
        return Rates(products, *(max(getattr(self, name), getattr(other, name)) for name in names))


def measure_apart(size: str) -> Rates:
    """Measure what this machine can do right now, in a process that takes its memory along when it ends.

    Args:
        size: a key of `SIZES`.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_rates, size).result()


def measure_rates(size: str) -> Rates:
    """Measure what this machine can do right now, on the disk that is used.

    Args:
        size: a key of `SIZES`.
    """
    model = outline(size)
    shapes = sorted({matrix.shape for matrix in matrices(model)})
    largest = max((matrix.shape for matrix in matrices(model)[:-1]), key=lambda shape: shape[0] * shape[1])
    products = {shape: measure_products(shape, SIZES[size].tokens) for shape in shapes}
    return Rates(products, *measure_disk(WORK, SIZES[size].probe), *measure_arithmetic(largest))


def seconds_of(work: Callable[[], object], times: int = 3) -> float:
    """Give the shortest time of something, after a first one that does not count."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


@torch.no_grad()
def measure_products(shape: tuple[int, int], tokens: int) -> tuple[float, float]:
    """Time the matrix products of one weight: x W^T, and backward's dy W and dy^T x."""
    weight = torch.randn(shape).bfloat16()
    x, dy = torch.randn(tokens, shape[1]).bfloat16(), torch.randn(tokens, shape[0]).bfloat16()
    forward = seconds_of(lambda: linear(x, weight))
    return forward, seconds_of(lambda: dy @ weight) + seconds_of(lambda: dy.t() @ x)


def measure_disk(folder: Path, num_bytes: int) -> tuple[float, float]:
    """Time direct reading and writing, in requests of 16 MiB by 4 threads, on a file without a name.

    Returns:
        Bytes per second, read and written: the best of four passes each.
    """
    request, threads = 2**24, 4
    buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
    for _ in range(threads):
        memory = mmap.mmap(-1, request)  # page-aligned
        memory.write(os.urandom(request))
        buffers.put(memory)
    with tempfile.NamedTemporaryFile(dir=folder) as named:
        file = os.open(named.name, os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(file, 0, num_bytes)

        def transfer(operation: Callable[..., int], offset: int) -> None:
            memory = buffers.get()
            assert operation(file, [memory], offset) == request
            buffers.put(memory)

        rates: dict[str, float] = {}
        # The first pass of writing is not used: it also takes the space.
        for operation in (os.pwritev, *(os.preadv, os.pwritev) * 4):
            start = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda offset, run=operation: transfer(run, offset), range(0, num_bytes, request)))
            rate = num_bytes / (time.perf_counter() - start)
            rates[operation.__name__] = max(rate, rates.get(operation.__name__, 0.0)) if rates else 0.0
        os.close(file)
    return rates["preadv"], rates["pwritev"]


def measure_arithmetic(shape: tuple[int, int]) -> tuple[float, float, float]:
    """Time the optimizer's step, the norm, and the adding up of gradients on one weight in memory.

    Returns:
        Parameters per second.
    """
    parameter = nn.Parameter(torch.randn(shape).bfloat16())
    optimizer = AdamW(
        [{"params": [parameter], "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.999),
        eps=1e-8,
        moments=lambda _: torch.uint8,
        masters="split",
        gradient_dtype=torch.float32,
        storage=Storage(torch.device("cpu"), WORK),
    )
    parameter.grad = torch.randn(shape).bfloat16()
    (parameter * parameter).sum().backward()
    step, norm = seconds_of(optimizer.step), seconds_of(lambda: optimizer.clip_gradients(max_norm=0))
    gradient = torch.randn(shape).bfloat16().view(-1)
    buffer, sums = torch.empty(CHUNK, dtype=torch.bfloat16), torch.zeros(parameter.numel())

    def gather() -> None:
        for chunk, total in zip(gradient.split(CHUNK), sums.split(CHUNK), strict=True):
            total.add_(buffer[: chunk.numel()].copy_(chunk))

    count = parameter.numel()
    return count / step, count / norm, count / seconds_of(gather)


def count_bytes(model: PreTrainedModel, optimizer: AdamW, placed: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Count what the phases of a step have to read and write, given what lives on disk.

    Returns:
        Bytes read and written, under the phases' names.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    gradients = 4 * count
    arrays = [array for parameter in model.parameters() for array in optimizer.states_of(parameter).values()]
    states = sum(array.numel() * array.element_size() for array in arrays)
    layers = [sum(2 * each.numel() for each in layer.parameters()) for layer in decoder_layers(model)]
    streamed = sum(layers) if placed.get("parameters") == "disk" else 0
    # Forward and backward each pass through all layers. There is room for two, which are there already where the
    # direction turns; only the step's first pass finds none.
    passes = (2 * ACCUMULATION * (len(layers) - 2) + 2) * streamed // len(layers)
    return {
        "forward and backward": (passes + (ACCUMULATION - 1) * gradients, ACCUMULATION * gradients),
        "clipping": (gradients, 0),
        "optimizer step": (gradients + states + streamed, states + streamed),
    }


def count_seconds(model: PreTrainedModel, rates: Rates) -> dict[str, dict[str, float]]:
    """Say how long the arithmetic of each phase takes at the measured rates.

    Args:
        model: without bytes; its shapes count.
        rates: of this machine.

    Returns:
        Seconds under what is computed, under the phases' names.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    products = [(matrix.forwards, *rates.products[matrix.shape]) for matrix in matrices(model)]
    return {
        "forward and backward": {
            "matrix products": ACCUMULATION * sum(times * forward + backward for times, forward, backward in products),
            "adding up": ACCUMULATION * count / rates.gather,
        },
        "clipping": {"squares": count / rates.norm},
        "optimizer step": {"update": count / rates.step},
    }


# ---------------------------------------------------------------------------------------------- reports


def report_memory() -> None:
    """Print the peaks."""
    own = {name: peak for name, peak in SAMPLER.peaks.items() if name != "between"}
    peaks = ", ".join(f"{name} {peak / GIB:.2f}" for name, peak in own.items())
    print(f"\nPeak anonymous memory: {max(SAMPLER.peaks.values()) / GIB:.2f} GiB ({peaks})")
    print(f"VmHWM, with pages of files: {memory_field('VmHWM') / GIB:.2f} GiB")


@dataclass
class Row:
    """A line of the table of times: measured, and what the machine's limits make of it."""

    phase: Phase = field(default_factory=Phase)
    counted: tuple[int, int] = (0, 0)
    arithmetic: float = 0.0
    disk: float = 0.0
    overlapped: float = 0.0

    def __add__(self, other: "Row") -> "Row":
        """Add phases up."""
        a, b = self.phase, other.phase
        return Row(
            Phase(a.seconds + b.seconds, a.cpu + b.cpu, a.read + b.read, a.written + b.written),
            (self.counted[0] + other.counted[0], self.counted[1] + other.counted[1]),
            self.arithmetic + other.arithmetic,
            self.disk + other.disk,
            self.overlapped + other.overlapped,
        )


def report_time(size: str, folder: Path, rates: Rates) -> None:
    """Print the last step beside the limit.

    Args:
        size: a key of `SIZES`.
        folder: of the checkpoint, beside which the results lie.
        rates: of this machine.
    """
    model, tokens = outline(size), ACCUMULATION * SIZES[size].tokens
    work, table = count_seconds(model, rates), {}
    taken = json.loads(results_file(folder).read_text())
    # Disks of virtual machines have their moods: where clipping, which only reads, was faster, it sets the limit.
    reading = [phases["clipping"][0] for phases in taken]
    rates = replace(rates, read=max(rates.read, *(phase["read"] / phase["seconds"] for phase in reading)))
    for name, (phase, (read, written)) in taken[-1].items():
        arithmetic = sum(work[name].values())
        disk = read / rates.read + written / rates.write
        table[name] = Row(Phase(**phase), (read, written), arithmetic, disk, max(arithmetic, disk))
    table["step"] = sum(table.values(), Row())
    products, operations = work["forward and backward"]["matrix products"], flops(matrices(model), tokens)
    print(
        f"\nRates, the best of before, after and clipping: matrix products {operations / products / 1e9:.0f} GFLOP/s "
        f"({operations / 1e12:.2f} TFLOP a step), disk {rates.read / GB:.2f} GB/s\n"
        f"read, {rates.write / GB:.2f} written; million parameters/s in memory: update {rates.step / 1e6:.0f}, "
        f"norm {rates.norm / 1e6:.0f}, adding gradients up {rates.gather / 1e6:.0f}"
    )
    print(
        "Seconds of arithmetic: " + ", ".join(f"{what} {s:.1f}" for each in work.values() for what, s in each.items())
    )
    print(f"\nStep {len(taken)} ({torch.get_num_threads()} threads; GB = 10^9 bytes; in brackets: counted)")
    print(f"{'':38}------- GB -------------------  -------- limit, s ---------   measured / limit")
    print(
        f"{'phase':22}{'seconds':>8}{'of CPU':>8}{'read':>15}{'written':>15}{'arithmetic':>12}{'disk':>7}{'sum':>7}"
        f"{'overlap':>9}{'sum':>8}{'overlap':>9}"
    )
    for name, row in table.items():
        total = row.arithmetic + row.disk
        read, written = (
            f"{real / GB:.1f} ({own / GB:.1f})"
            for real, own in zip((row.phase.read, row.phase.written), row.counted, strict=True)
        )
        print(
            f"{name:22}{row.phase.seconds:8.1f}{row.phase.cpu:8.1f}{read:>15}{written:>15}{row.arithmetic:12.1f}{row.disk:7.1f}{total:7.1f}"
            f"{row.overlapped:9.1f}{row.phase.seconds / total:8.2f}{row.phase.seconds / row.overlapped:9.2f}"
        )
    print(
        f"{tokens / table['step'].phase.seconds:.2f} tokens/s. Limits: sum: one thing after the other; overlap: at once"
    )


# ---------------------------------------------------------------------------------------------- the command


def main() -> None:
    """Write the checkpoint, train in each mode, and delete it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--weights", choices=(*PLACES, "both"), default="both", help="where they are (both in turn)")
    parser.add_argument("--size", choices=tuple(SIZES), default="7b", help="of the model (7b)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (2); the last one is compared")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # what each mode's process does
    arguments = parser.parse_args()
    folder = WORK / ("mistral-7b" if arguments.size == "7b" else f"mistral-7b-{arguments.size}")
    if arguments.train:
        return train(arguments.size, arguments.weights, folder, arguments.steps)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    WORK.mkdir(exist_ok=True)
    for weights in PLACES if arguments.weights == "both" else [arguments.weights]:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\n{MODEL}'s shape, size {arguments.size}, weights {weights}, offload {PLACES[weights]}", flush=True)
        require_disk(arguments.size, weights, folder)
        try:
            rates = measure_apart(arguments.size)
            start = time.perf_counter()
            write_checkpoint(folder, arguments.size)
            print(f"Checkpoint written in {time.perf_counter() - start:.0f} s", flush=True)
            command = [sys.executable, __file__, "--train", "--weights", weights, "--size", arguments.size]
            subprocess.run([*command, "--steps", str(arguments.steps)], check=True)
            shutil.rmtree(folder, ignore_errors=True)
            rates = rates.best(measure_apart(arguments.size))
            report_time(arguments.size, folder, rates)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            results_file(folder).unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    main()
