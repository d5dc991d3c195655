"""Check the memory lesson's numbers with this repository's own tools, and write `docs/lesson.md`.

    python benchmarks/lesson.py

Owns the list of claims, the computation that answers each, and the words around them. Nothing is downloaded and no
weight is loaded: 7B and 70B models are planned on fake tensors; only a small Llama is run for real. Half a minute.
"""

# ruff: noqa: E402
import functools
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from fullft.attention.documents import apply_document_attention
from fullft.config.config import Config, resolve
from fullft.data.batches import MicroBatch
from fullft.memory.facts import find_facts
from fullft.memory.plan import Batch, plan_step, shortened
from fullft.memory.worst_step import take_worst_step
from fullft.model.configs import bundled_config
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import Storage
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing

PAGE = ROOT / "docs" / "lesson.md"
MISTRAL, LLAMA_70B = "mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3.1-70B"
GB, MIB, GIB = 10**9, 2**20, 2**30
LENGTH = 512
CARD = 80 * GIB - GIB // 2  # an 80 GB card has 80 GiB; half a GiB goes to the CUDA context

# ---------------------------------------------------------------------------------------------- the tools


def options(**changes) -> Config:
    """Make the lesson's options: bf16 weights, AdamW, 1 x 512 tokens, 16 micro-batches."""
    lesson = {"precision": "bf16-true", "master_weights": "none", "optim": "adamw"}
    lesson |= {"activation_checkpointing": "none", "offload": "none"}
    return resolve(Config(model="given", **lesson | changes))


def model_config(name: str):
    """Give a bundled config."""
    return AutoConfig.for_model(**bundled_config(name))


@functools.cache
def plan(name: str, **changes) -> dict:
    """Plan the lesson's step, with some options changed."""
    length = changes.pop("length", LENGTH)
    return plan_step(options(**changes), model_config(name), Batch(1, length))


def small_llama() -> LlamaConfig:
    """A model that can be run for real here: 8 layers of width 256."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
    )


def track(mode: str) -> dict:
    """Track the small Llama's step on real tensors."""
    config = options(activation_checkpointing=mode)
    model = AutoModelForCausalLM.from_config(small_llama(), dtype=torch.bfloat16).train()
    apply_document_attention(model)
    apply_activation_checkpointing(model, config)
    ids = torch.randint(0, 2048, (1, LENGTH))
    batch = MicroBatch({"input_ids": ids}, ids, LENGTH, LENGTH - 1)
    plain = torch.autocast("cpu", enabled=False)
    optimizer = build_optimizer(model, config, Storage(model.device, ROOT))
    return take_worst_step(model, optimizer, [batch] * 2, None, plain, 1.0).to_dict()


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Take the model's own loss: ours takes gradients in forward, where torch's counter of operations cannot follow."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def count_flops(shape, mode: str) -> int:
    """Count the floating-point operations of one forward and backward, on fake tensors."""
    with FakeTensorMode(), no_init_weights(), FlopCounterMode(display=False) as counter:
        # The matrix products of eager attention are all counted; those inside torch's fused one are not, on CPUs.
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="eager").train()
        apply_activation_checkpointing(model, options(activation_checkpointing=mode))
        ids = torch.ones(1, LENGTH, dtype=torch.int64)
        loss_of(model, ids).backward()
    return counter.get_total_flops()


def extra_flops(shape) -> float:
    """Give what `full` checkpointing adds, as a share; layers are all alike, so that 2 and 3 tell of all."""

    def whole(mode: str) -> int:
        two, three = (count_flops(shortened(shape, layers), mode) for layers in (2, 3))
        return two + (shape.num_hidden_layers - 2) * (three - two)

    return whole("full") / whole("none") - 1


def extra_flops_on_real_tensors() -> float:
    """Give the same for the small Llama, really run, with all its layers."""

    def count(mode: str) -> int:
        model = AutoModelForCausalLM.from_config(small_llama(), attn_implementation="eager").train()
        apply_activation_checkpointing(model, options(activation_checkpointing=mode))
        ids = torch.randint(0, 2048, (1, LENGTH))
        with FlopCounterMode(display=False) as counter:
            loss_of(model, ids).backward()
        return counter.get_total_flops()

    return count("full") / count("none") - 1


def moments_dtype(weights: torch.dtype) -> torch.dtype:
    """Ask torch which dtype AdamW's moments have."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=weights))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return optimizer.state[parameter]["exp_avg"].dtype


# ---------------------------------------------------------------------------------------------- the words


def gb(size: float, digits: int = 2) -> str:
    """Write bytes in GB."""
    return f"{size / GB:,.{digits}f} GB"


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Lay claims out."""
    lines = ["| the lesson says | we find | verdict |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def saving(kind: str, none: dict, full: dict) -> float:
    """Give how much smaller a component's maximum is with checkpointing."""
    return 1 - full["components"][kind] / none["components"][kind]


def the_table() -> str:
    """The lesson's table for Mistral-7B."""
    none, full = plan(MISTRAL), plan(MISTRAL, activation_checkpointing="full")
    count = none["num_parameters"]
    weights, gradients = none["components"]["parameters"], none["components"]["gradients"]
    moment = 4 * count
    fixed = weights + gradients + 2 * moment

    def with_fp32_moments(figures: dict) -> int:
        return figures["peak_bytes"] - figures["at_peak"]["optimizer_states"] + 2 * moment

    totals = [with_fp32_moments(figures) for figures in (full, none)]
    kept = [figures["components"]["activations"] for figures in (full, none)]
    tokens = [round(size * GB / kept[1] * LENGTH, -1) for size in (5, 15)]
    rows = [
        ("N = 7,241,732,096", f"{count:,}", "exact"),
        ("weights 14.48 GB", gb(weights), "exact"),
        ("gradients 14.48 GB", gb(gradients), "exact"),
        ("Adam m 28.97 GB", gb(moment) + " in fp32", "exact, for fp32 moments"),
        ("Adam v 28.97 GB", gb(moment) + " in fp32", "exact, for fp32 moments"),
        (
            "activations 5-15 GB",
            f"{gb(kept[1])} without checkpointing, {gb(kept[0])} with",
            f"high for 512 tokens: the range is that of {tokens[0]:,.0f} to {tokens[1]:,.0f}",
        ),
        (
            "total 87-97 GB",
            f"{gb(fixed)} before any activation; peak {gb(totals[0])} with checkpointing, {gb(totals[1])} without",
            "holds" if 86.5 * GB <= totals[0] and totals[1] <= 97.5 * GB else "off",
        ),
        (
            "four A100 80GB",
            f"two hold {gb(2 * CARD, 0)}, if everything is sharded evenly; one card is too small",
            "safe: two would do for the memory alone",
        ),
    ]
    return table(rows)


def seventy_billion() -> str:
    """Llama-3.1-70B."""
    count = plan(LLAMA_70B)["num_parameters"]
    size = 12 * count
    ours = f"12 B x {count:,} = {gb(size, 0)}, before activations"
    return table([("Llama-3.1-70B: roughly 800 GB", ours, f"holds, {1 - 800 * GB / size:.0%} on the low side")])


def checkpointing() -> str:
    """Saving, cost, growth."""
    none, full = plan(MISTRAL), plan(MISTRAL, activation_checkpointing="full")
    real_none, real_full = track("none"), track("full")
    gone = saving("activations", none, full)
    peak = none["peak_bytes"] - full["peak_bytes"]
    large, small = extra_flops(model_config(MISTRAL)), extra_flops_on_real_tensors()
    rows = [
        (
            "activations down 60-70%",
            f"down {gone:.0%} on Mistral-7B (planned: {gb(none['components']['activations'])} to "
            f"{gb(full['components']['activations'])}), {saving('activations', real_none, real_full):.0%} on a Llama "
            f"of 8 layers (tracked while it ran); the peak falls by {gb(peak)}",
            "better than claimed",
        ),
        (
            "about 33% more FLOPs",
            f"{large:.1%} for Mistral-7B (fake tensors), {small:.1%} for the small Llama (real ones)",
            "holds, as an upper bound",
        ),
        (
            "O(layers) to O(sqrt layers)",
            "still O(layers), see below",
            "off, but less is kept than the claim would give",
        ),
    ]
    return table(rows)


def growth() -> str:
    """What is kept per number of layers, as a table."""

    def kept(mode: str, layers: int) -> int:
        shape = model_config(MISTRAL)
        shape.num_hidden_layers = layers
        planned = plan_step(options(activation_checkpointing=mode), shape, Batch(1, LENGTH))
        return planned["components"]["activations"]

    layer_input = LENGTH * model_config(MISTRAL).hidden_size * 2
    one_layer = kept("none", 17) - kept("none", 16)
    lines = ["| layers | none | every_2 | selective | full | sqrt(layers) segments |", "|---|---|---|---|---|---|"]
    for layers in (8, 16, 32, 64):
        sizes = [kept(mode, layers) for mode in ("none", "every_2", "selective", "full")]
        sizes.append(round(math.sqrt(layers) * (layer_input + one_layer)))
        lines.append(f"| {layers} | " + " | ".join(f"{size / MIB:,.0f} MiB" for size in sizes) + " |")
    return "\n".join(lines) + (
        f"\n\nOne layer keeps {one_layer / MIB:,.0f} MiB; its input alone is {layer_input / MIB:.0f} MiB, "
        f"{one_layer / layer_input:.0f} times less."
    )


def eight_bits() -> str:
    """8-bit AdamW."""
    facts = find_facts(model_config(MISTRAL), LENGTH)
    count = facts.parameters
    planned = plan(MISTRAL, optim="adamw_8bit")["components"]["optimizer_states"]
    both = plan(MISTRAL, optim="adamw_8bit", activation_checkpointing="full")
    rows = [
        (
            "8-bit Adam: roughly half the optimizer memory",
            f"{gb(planned)}: {planned / (4 * count):.0%} of bf16 moments ({gb(4 * count)}), "
            f"{planned / (8 * count):.0%} of the lesson's own fp32 ones ({gb(8 * count)})",
            "holds against bf16 moments; against the lesson's table it saves more",
        ),
        (
            "both together: still 40+ GB",
            f"{gb(both['peak_bytes'])} ({both['peak_bytes'] / GIB:.1f} GiB)",
            "holds" if both["peak_bytes"] > 40 * GB else "off",
        ),
    ]
    return table(rows)


def one_card() -> str:
    """What is left on the device when the rest lives elsewhere, exact AdamW with fp32 masters and moments."""
    lines = ["| on the device | on the host or on disk | what moves there |", "|---|---|---|"]
    rungs = (
        ("nothing: fp32 masters, as 2 + 2 bytes", "none"),
        ("optimizer states", "optimizer=host"),
        ("gradients too", "optimizer=host,gradients=host"),
        ("the layers' weights too", "optimizer=host,gradients=host,parameters=host"),
    )
    for name, offload in rungs:
        changes = {"master_weights": "split", "activation_checkpointing": "full", "offload": offload}
        planned = plan(MISTRAL, **changes)
        device, host = (planned[key] for key in ("peak_bytes", "host_bytes"))
        lines.append(f"| {gb(device)} ({device / GIB:.1f} GiB) | {gb(host) if host else 'nothing'} | {name} |")
    return "\n".join(lines)


def several_gpus() -> str:
    """ZeRO-3."""
    room = 4 * CARD
    sizes = {per: room / per / GB for per in (12, 8, 6, 2)}
    found = ", ".join(f"{size:.0f}B at {per} B" for per, size in sizes.items())
    row = (
        "ZeRO-3 on 4 x 80 GB: models up to ~150B",
        f"four cards hold {gb(room, 0)}; by bytes per parameter, without a single activation: {found}",
        f"off: that is {room / (150 * GB):.1f} B per parameter, room for bf16 weights alone",
    )
    return table([row])


def lora() -> str:
    """LoRA's trainable count."""
    facts = find_facts(model_config(MISTRAL), LENGTH)
    adapters = facts.lora_parameters
    row = (
        "LoRA: ~4M trainable instead of 7.24B, 1800x",
        f"{adapters:,} at rank 8 on queries and values: {facts.parameters / adapters:,.0f}x",
        "close, a little high",
    )
    return table([row])


def phases() -> str:
    """Peak of each phase."""
    lines = ["| Mistral-7B, all bf16 | forward | backward | optimizer step | peak | sum of maxima |", "|---" * 6 + "|"]
    for name, changes in {
        "16 micro-batches": {},
        "16, checkpointing": {"activation_checkpointing": "full"},
        "1 micro-batch": {"gradient_accumulation_steps": 1},
    }.items():
        figures = plan(MISTRAL, **changes)
        sizes = [figures["phases"][phase] for phase in ("forward", "backward", "optimizer_step")]
        sizes += [figures["peak_bytes"], sum(figures["components"].values())]
        lines.append(f"| {name} | " + " | ".join(gb(size) for size in sizes) + " |")
    return "\n".join(lines)


def page() -> str:
    """Write the page."""
    bf16 = str(moments_dtype(torch.bfloat16)).removeprefix("torch.")
    fp32 = str(moments_dtype(torch.float32)).removeprefix("torch.")
    all_bf16 = plan(MISTRAL)
    count = all_bf16["num_parameters"]
    return f"""# The memory lesson, checked

<!-- Written by `python benchmarks/lesson.py`; edit that file, not this one. -->

The lesson explains full fine-tuning by one table: where every byte goes when all 7.24 billion parameters of Mistral-7B
are trained. The table is the right idea, and right to the decimal where it can be. Here each of the lesson's numbers
stands beside what this code finds. Plans run the real training step on fake tensors, which have shapes but no bytes;
a test shows that they equal what is tracked on real tensors. GB is 10^9 bytes; GiB and MiB are 2^30 and 2^20.

## The table: Mistral-7B, bf16 weights, 1 x 512 tokens

{the_table()}

The four large numbers are multiplications: 2, 2, 4 and 4 bytes per parameter. Activations alone depend on the batch,
and grow with its tokens. For 512 of them they are below the lesson's range even without checkpointing: attention here
never writes its scores to memory, and logits are counted apart.

The table is that of an optimizer that keeps fp32 moments beside bf16 weights. torch's does not:

| weights | torch's AdamW keeps its moments in |
|---|---|
| bfloat16 | {bf16} |
| float32 | {fp32} |

Plain PyTorch with bf16 weights thus needs 8 bytes per parameter, not 12: {gb(8 * count)},
and {gb(all_bf16["peak_bytes"])} at the peak. The missing bytes are missing precision, too: bf16 has 8 significant bits,
and an update below 1/512 of a weight is rounded away. fp32 moments are what fp32 weights bring, or `bitsandbytes`'
AdamW.

## 70B

{seventy_billion()}

## The peak is a moment, not a sum

{phases()}

Activations are largest when backward begins, and gone when the optimizer steps; gradients grow while activations
shrink. With one micro-batch the two hardly meet, and the peak stays below the sum of all maxima. From the second
micro-batch on, gradients are there during forward and backward, and the sum is nearly reached: so a table that adds
everything up is fair to a run with accumulation, and unfair to one without.

## Activation checkpointing

{checkpointing()}

The saving is that of the activations, which are what forward keeps for backward; logits and temporaries stay. As for
the FLOPs: forward is a third of forward and backward, so that computing it twice costs a third more, at most. It costs
less, because the output head is not recomputed, and because torch stops recomputing a layer at the last tensor that
backward asks for: nobody asks for the layer's output, so its last matrix product, a quarter of the layer, is left out.
(Counted with eager attention, whose matrix products the counter sees.)

Kept for backward in Mistral-7B's shape at 1 x 512 tokens, at the worst moment:

{growth()}

`full` keeps the input of every layer, and one whole layer while that is recomputed: still O(layers), with a far smaller
constant. Hugging Face's `gradient_checkpointing` does the same. O(sqrt layers) is another scheme (Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", 2016): keep the inputs of sqrt(layers) segments, and recompute a whole
segment at a time. But then sqrt(layers) whole layers are alive at once, and in a transformer a layer is so much larger
than its input that this costs more (last column, by arithmetic). The better growth loses to the better constant.

## 8-bit states

{eight_bits()}

Two bytes per parameter for both moments, instead of four or eight, and a scale per 256 elements; not a clean half or
quarter, because embeddings and small tensors keep fp32 states.

## One card

The lesson gives up here: "practically impossible on consumer hardware". What does not fit need not stay, and nothing
about AdamW changes by that: gradients still add up over 16 micro-batches and are clipped by their exact norm.

{one_card()}

So a card of 24, 16 or even 8 GB trains all of Mistral-7B if the host has the memory, or the disk; a step
takes longer by what must move. The weights are bf16 numbers whose lower halves are kept beside the states, so that no
update is lost.

## Several GPUs

{several_gpus()}

ZeRO-3 divides weights, gradients and states evenly, so that the largest model is all cards' memory divided by the bytes
per parameter. 150B is reached only when gradients and states live elsewhere, in host memory or on disk
(ZeRO-Infinity): there the lesson's number is right, but {gb(10 * 150e9, 0)} of gradients and states must then fit
beside the cards.

## LoRA

{lora()}

A matrix of n x m gets 8 (n + m) trainable numbers. Mistral's values have 8 heads of 128 instead of 32 (grouped-query
attention), so that its value matrices are 1024 x 4096. Were they square, as in Llama-2-7B, the count would be
{8 * 2 * (4096 + 4096) * 32:,}: the lesson's "~4M", and nearly its factor.
"""


def main() -> None:
    """Write the page."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # next to nothing is computed
    torch.manual_seed(0)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
