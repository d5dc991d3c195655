"""Attention alone, the optimizer's step alone, compilation on and off, for `gpu.py`."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from gpu_findings import GIB, Findings
from gpu_steps import Training, config_of, global_batch, small_config
from optimizer_step import ROWS
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fullft.attention.choice import attention_of, choose_attention

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DOCUMENT = 512  # tokens of a packed document
REPEATS = 5
PARAMETERS = 1 << 27  # that an optimizer steps at once
# Of a layer in Llama-3-8B's shape, whose feed-forward part is left so small that attention is nearly all.
LAYER = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 64}
TOY_LAYER = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
AGREES = 0.03  # bf16 rounds by 0.004, at several places of a layer

Work = Callable[[], object]


def run(findings: Findings) -> None:
    """Time all three."""
    findings.note(
        f"Attention: one decoder layer, forward and backward, on packed documents of at most {DOCUMENT} tokens in "
        "bf16, projections included. Ours as `train.py` chooses it; beside it sdpa with the mask of L x L numbers that "
        "transformers makes of restarting positions."
    )
    findings.note(
        "The optimizer: bytes are those that must be read and written, once each, and not those that are. "
        "A copy within the card's memory shows what can be reached."
    )
    lengths, count = ((128, 256), 1 << 16) if findings.is_emulated else (LENGTHS, PARAMETERS)
    cases: dict[str, Work] = {f"attention, {length} tokens": partial(attend, findings, length) for length in lengths}
    cases["a copy"] = partial(copy, findings, count)
    on_device = [name for name in ROWS if "disk" not in name]
    cases |= {name: partial(step_alone, findings, name, count) for name in on_device}
    if findings.is_emulated:
        findings.note("Compilation: left out, since the emulated device has no compiler.")
    else:
        cases |= {f"compile {word}": partial(train, findings, word) for word in ("false", "true")}
    findings.carry_out(cases)


def seconds_of(work: Work) -> float:
    """Return the median time of work on the card, after a first time that may have to prepare something."""
    times = []
    for _ in range(1 + REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


# ---------------------------------------------------------------------------------------------- attention


def attend(findings: Findings, length: int) -> None:
    """Time a layer with our attention and with torch's, and compare what comes out."""
    shape = LlamaConfig(
        vocab_size=512,
        num_hidden_layers=1,
        max_position_embeddings=length,
        **(TOY_LAYER if findings.is_emulated else LAYER),
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa").train()
        inputs = {
            "input_ids": torch.randint(0, 512, (1, length)),
            "position_ids": (torch.arange(length) % min(DOCUMENT, length // 2))[None],
        }
    reference, theirs = measure(model, inputs)
    choose_attention(model, joins_rows=True)
    name = attention_of(model)
    outputs, ours = measure(model, inputs)
    row = {"tokens": length, "ours": str(name), **{f"ours, {head}": each for head, each in ours.items()}}
    row |= {f"sdpa, {head}": each for head, each in theirs.items()}
    if reference is None or outputs is None:
        findings.require(outputs is not None, f"attention of {length} tokens: out of memory with {name}")
        findings.add("Attention", row)
        return
    difference = ((outputs - reference).norm() / reference.norm()).item()
    findings.add("Attention", {**row, "outputs differ by": difference})
    findings.require(difference < AGREES, f"attention of {length} tokens: {name} differs from sdpa by {difference:.1e}")


def measure(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor | None, dict[str, float | str]]:
    """Time a decoder.

    Args:
        model: whose decoder is asked.
        inputs: of a micro-batch.

    Returns:
        What the decoder gives, in fp32, and milliseconds and peak memory; None where memory has run out.
    """

    def take() -> torch.Tensor:
        model.zero_grad()
        states: torch.Tensor = model.model(**inputs, use_cache=False).last_hidden_state
        states.float().square().mean().backward()
        return states.detach()

    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        taken: dict[str, float | str] = {"ms": 1e3 * seconds_of(take)}
        taken["GiB"] = (torch.cuda.max_memory_allocated() - before) / GIB
        return take().float(), taken
    except torch.OutOfMemoryError:
        return None, {"ms": "out of memory"}


# ---------------------------------------------------------------------------------------------- the optimizer


def copy(findings: Findings, count: int) -> None:
    """Time a copy of as many fp32 numbers."""
    one, other = torch.zeros(2, count, device="cuda")
    seconds = seconds_of(lambda: one.copy_(other))
    _add_update(findings, "a copy of fp32 numbers", count, 8.0, seconds)


def step_alone(findings: Findings, name: str, count: int) -> None:
    """Time a step of one flat tensor.

    Args:
        findings: to add to.
        name: one of `ROWS`.
        count: parameters.
    """
    state_bytes, prepare = ROWS[name]
    torch.manual_seed(0)
    weights = torch.randn(count, device="cuda")
    step = prepare(weights, torch.randn_like(weights) * 1e-3)
    # Our whole optimizer has weights and gradients in bf16; the other rows have them in fp32.
    width = 2 if "split" in name or "stochastic" in name else 4
    _add_update(findings, name, count, 2 * state_bytes + 3 * width, seconds_of(step))


def _add_update(findings: Findings, name: str, count: int, moved: float, seconds: float) -> None:
    findings.add(
        f"The optimizer's step, {count:,} parameters",
        {
            "what": name,
            "bytes per parameter": moved,
            "ns per parameter": 1e9 * seconds / count,
            "GB/s": moved * count / seconds / 1e9,
        },
    )


# ---------------------------------------------------------------------------------------------- compilation


def train(findings: Findings, compile: str) -> None:
    """Time steps of SmolLM2-135M's shape, packed, with layers compiled or not.

    Args:
        findings: to add to.
        compile: as the option.
    """
    config = config_of(precision="bf16-true", packing=True, compile=compile)
    model_config = small_config(is_emulated=False)
    training = Training.of(config, model_config, torch.device("cuda"))
    rows = global_batch(config, model_config.vocab_size, 8, 1024)
    torch.cuda.reset_peak_memory_stats()
    try:
        _, first = training.take_step(rows)
        seconds = statistics.median(training.take_step(rows)[1] for _ in range(REPEATS))
    finally:
        training.optimizer.close()
    findings.add(
        "Compilation, SmolLM2-135M's shape, steps of 8 x 1,024 packed tokens",
        {
            "compile": compile,
            "first step, s": first,
            "step, ms": 1e3 * seconds,
            "tokens/s": rows.num_tokens / seconds,
            "allocated, GiB": torch.cuda.max_memory_allocated() / GIB,
        },
    )
