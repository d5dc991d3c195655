"""How many GPUs a model needs under ZeRO: the tables and the picture of `lesson.py`'s part on several GPUs.

All is planned: each point is a step on fake tensors, over a group of processes that is not there.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from lesson_figures import model_config, options
from transformers import LlamaConfig, PreTrainedConfig

from fullft.memory.facts import find_facts
from fullft.memory.plan import Batch, plan_step, shortened

GIB, GB = 2**30, 10**9
CARD = 80 * GIB - GIB // 2  # an 80 GB card, less half a GiB for the CUDA context
TOKENS = 2048  # of a micro-batch, with full checkpointing and several per step
MOST = 1024  # GPUs
FOUR = 4  # GPUs of the lesson's claim

# Two sizes between the bundled ones: the shapes of Llama-2-13B and CodeLlama-34B, with Llama-3's vocabulary.
_SHAPES = {
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "34B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64},
}
_BUNDLED = {"1B": "3.2-1B", "3B": "3.2-3B", "8B": "3.1-8B", "70B": "3.1-70B", "405B": "3.1-405B"}
SIZES = ("1B", "3B", "8B", "13B", "34B", "70B", "405B")

_AWAY = "optimizer=host,gradients=host"
# Name, stage, what is offloaded, and the bytes per parameter that stay on each of n GPUs at least.
SYSTEMS: dict[str, tuple[str, str, Callable[[int], float]]] = {
    "ZeRO-1": ("optimizer", "none", lambda n: 6 + 10 / n),
    "ZeRO-2": ("gradients", "none", lambda n: 2 + 14 / n),
    "ZeRO-3": ("full", "none", lambda n: 16 / n),
    "ZeRO-3, states and gradients on the host": ("full", _AWAY, lambda n: 2 / n),
}


@functools.cache
def config_of(size: str) -> PreTrainedConfig:
    """Return the config of a Llama of about this size."""
    if size in _BUNDLED:
        return model_config(f"meta-llama/Llama-{_BUNDLED[size]}")
    return LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, **_SHAPES[size])


def needed_bytes(model: PreTrainedConfig, gpus: int, stage: str, offload: str) -> int:
    """Plan the peak of each GPU and its margin: bf16 weights with split masters, fp32 moments, full checkpointing."""
    ranks = {"gpus": gpus, "shard": stage} if gpus > 1 else {}
    config = options(
        master_weights="split",
        activation_checkpointing="full",
        offload=offload,
        gradient_accumulation_steps=2,
        plan=True,
        device_memory="80GiB",
        **ranks,
    )
    planned = plan_step(config, model, Batch(1, TOKENS))
    return int(planned["peak_bytes"] + planned["margin_bytes"])


@functools.cache
def gpus_needed(size: str, system: str) -> int | None:
    """Return the least power of two of GPUs that a model fits on; None if `MOST` are not enough."""
    stage, offload, at_least = SYSTEMS[system]
    model = config_of(size)
    parameters = find_facts(model, TOKENS).parameters
    counts = [2**power for power in range(MOST.bit_length())]

    def fits(gpus: int) -> bool:
        return parameters * at_least(gpus) < CARD and needed_bytes(model, gpus, stage, offload) <= CARD

    low, high = 0, len(counts)  # the answer is between them
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(counts[middle]) else (middle + 1, high)
    return counts[low] if low < len(counts) else None


def needed_table() -> str:
    """Tabulate the GPUs of 80 GB that each size needs."""
    lines = ["| model | parameters | " + " | ".join(SYSTEMS) + " |", "|---" * (len(SYSTEMS) + 2) + "|"]
    for size in SIZES:
        parameters = find_facts(config_of(size), TOKENS).parameters
        needed = [gpus_needed(size, system) for system in SYSTEMS]
        cells = ["none is enough" if count is None else f"{count:,}" for count in needed]
        lines.append(f"| {size} | {parameters / 1e9:,.1f}B | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@functools.cache
def largest_on_four(offload: str) -> int:
    """Return the parameters of the largest Llama on four cards under ZeRO-3: as wide as the 70B, as deep as fits."""
    deep = LlamaConfig(**{**config_of("70B").to_dict(), "num_hidden_layers": 400})
    low, high = 1, 400
    while high - low > 1:
        middle = (low + high) // 2
        fits = needed_bytes(shortened(deep, middle), FOUR, "full", offload) <= CARD
        low, high = (middle, high) if fits else (low, middle)
    return find_facts(shortened(deep, low), TOKENS).parameters


def claim() -> tuple[str, str, str]:
    """Check the largest model of ZeRO-3."""
    here, away = largest_on_four("none"), largest_on_four(_AWAY)
    return (
        "ZeRO-3 on 4 x 80 GB: models up to ~150B",
        f"planned: {here / 1e9:.0f}B with everything on the cards; {away / 1e9:.0f}B with states and gradients on the "
        f"host, which then holds {14 * away / GB:,.0f} GB",
        "off by a factor of "
        f"{150e9 / here:.0f}, unless only the weights stay on the cards"
        + ("" if away >= 150e9 else "; even then a little high"),
    )


def draw(file: Path) -> None:
    """Draw how many GPUs each size needs.

    Args:
        file: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, _), style in zip(SYSTEMS.items(), ("o-", "s-", "D-", "^--"), strict=True):
        points = [(find_facts(config_of(size), TOKENS).parameters, gpus_needed(size, name)) for size in SIZES]
        known = [(count, gpus) for count, gpus in points if gpus is not None]
        (line,) = axes.plot(*zip(*known, strict=True), style, label=name)
        if len(known) < len(points):
            axes.annotate("none is enough", known[-1], (6, 6), textcoords="offset points", color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="GPUs of 80 GB")
    axes.set_yticks([2**power for power in range(MOST.bit_length())], [str(2**p) for p in range(MOST.bit_length())])
    axes.set_xticks([1e9, 3e9, 1e10, 3e10, 1e11, 4e11], ["1B", "3B", "10B", "30B", "100B", "400B"])
    axes.minorticks_off()
    axes.set_title(f"GPUs needed, planned: 1 x {TOKENS:,} tokens each, full checkpointing")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
