"""Check the numbers of the memory lesson, and write `docs/lesson.md`.

    python benchmarks/lesson.py

The words of the page are here, its tables in `lesson_tables.py`, their figures in `lesson_figures.py`. Nothing is
downloaded and no weight is loaded: 7B and 70B models are planned on fake tensors. Only a small Llama is run on real
ones. It takes some minutes, and prints the name of the page.
"""

import argparse

import torch
from lesson_figures import ROOT, moments_dtype, plan
from lesson_ranks import MOST, TOKENS, draw, needed_table
from lesson_tables import (
    MISTRAL,
    checkpointing,
    eight_bits,
    gb,
    growth,
    lora,
    one_card,
    phases,
    seventy_billion,
    several_gpus,
    the_table,
)
from transformers.utils import logging

PAGE, PICTURE = ROOT / "docs" / "lesson.md", ROOT / "docs" / "gpus.png"


def page() -> str:
    """Return the text of the page."""
    bf16 = str(moments_dtype(torch.bfloat16)).removeprefix("torch.")
    fp32 = str(moments_dtype(torch.float32)).removeprefix("torch.")
    all_bf16 = plan(MISTRAL)
    count = all_bf16["num_parameters"]
    return f"""# The memory lesson, checked

<!-- Written by `python benchmarks/lesson.py`; edit that file, not this one. -->

The lesson explains full fine-tuning with one table: where every byte goes when all 7.24 billion parameters of
Mistral-7B are trained. The table is the right idea, and most of it is exact. This page compares each of the lesson's
numbers with what this code finds.

Plans run the real training step on fake tensors, which have shapes but no bytes. A test shows that they equal what is
tracked on real tensors. GB is 10^9 bytes; GiB and MiB are 2^30 and 2^20.

## The table: Mistral-7B, bf16 weights, 1 x 512 tokens

{the_table()}

The four large numbers are products: the number of parameters times 2, 2, 4 and 4 bytes. Only activations depend on the
batch, and they grow with its tokens. For 512 tokens they are below the lesson's range, even without checkpointing.
Attention here never writes its scores to memory, and logits are counted apart.

The table describes an optimizer with fp32 moments next to bf16 weights. torch's AdamW is not such an optimizer:

| weights | torch's AdamW keeps its moments in |
|---|---|
| bfloat16 | {bf16} |
| float32 | {fp32} |

So plain PyTorch with bf16 weights needs 8 bytes per parameter, not 12. That is {gb(8 * count)},
and {gb(all_bf16["peak_bytes"])} at the peak. The missing bytes are missing precision, too. bf16 has 8 significant bits,
so an update below 1/512 of a weight is rounded away. fp32 moments come with fp32 weights, or with `bitsandbytes`'
AdamW.

## 70B

{seventy_billion()}

## The peak is a moment, not a sum

{phases()}

Activations are largest when backward begins, and gone when the optimizer steps. Gradients grow while activations
shrink. With one micro-batch the two hardly overlap, and the peak stays below the sum of all maxima. From the second
micro-batch on, gradients exist during forward and backward, and the peak nearly reaches the sum. So a table that adds
everything up is right for a run with accumulation, and too high for one without.

## Activation checkpointing

{checkpointing()}

The saving is in the activations, which forward keeps for backward. Logits and temporaries stay.

Forward takes a third of the FLOPs of forward and backward. So computing it twice costs at most a third more. It costs
less, because the output head is not recomputed, and because torch stops recomputing a layer early. It stops at the last
tensor that backward needs, which is not the layer's output. So the layer's last matrix product, a quarter of the layer,
is skipped. (FLOPs are counted with eager attention, whose matrix products the counter sees.)

Kept for backward in Mistral-7B's shape at 1 x 512 tokens, at the worst moment:

{growth()}

`full` keeps the input of every layer, and one whole layer while that is recomputed. That is still O(layers), with a far
smaller constant. Hugging Face's `gradient_checkpointing` does the same.

O(sqrt layers) is another scheme (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016). It keeps the
inputs of sqrt(layers) segments, and recomputes a whole segment at a time. Then sqrt(layers) whole layers exist at once.
In a transformer a layer is so much larger than its input that this costs more (last column, by arithmetic). The better
growth loses to the better constant.

## 8-bit states

{eight_bits()}

Both moments take two bytes per parameter instead of four or eight, plus a scale per 256 elements. The share is not
exactly a half or a quarter, because embeddings and small tensors keep fp32 states.

## One card

The lesson gives up here: "practically impossible on consumer hardware". But what does not fit can live elsewhere, and
AdamW stays the same. Gradients still add up over 16 micro-batches, and are clipped by their exact norm.

{one_card()}

So a card of 24, 16 or even 8 GB trains all of Mistral-7B, if the host or the disk has room for the rest. Steps take
longer, since data must move. The weights are bf16 numbers whose lower halves are kept next to the states, so that no
update is lost.

## Several GPUs

{several_gpus()}

ZeRO-3 divides weights, gradients and states evenly, 16 bytes per parameter in all. So 150B is reached only when
gradients and states live elsewhere, in host memory or on disk (ZeRO-Infinity).

How many GPUs of 80 GB does a model need? Each has 1 x {TOKENS:,} tokens at a time, recomputes every layer, and keeps
fp32 masters and moments. Powers of two were tried, up to {MOST:,}:

{needed_table()}

![GPUs needed against model size](gpus.png)

ZeRO-1 and ZeRO-2 keep all weights on each GPU. So there is a size that no number of them can train: their lines end.
ZeRO-3 has no such end, but needs room for the layers at work, whatever the number. [Several GPUs](guides/cluster.md)
says what each stage sends, and how to start it.

## LoRA

{lora()}

A matrix of n x m gets 8 (n + m) trainable numbers. Mistral's values have 8 heads of 128 instead of 32 (grouped-query
attention), so its value matrices are 1024 x 4096. If they were square, as in Llama-2-7B, the count would be
{8 * 2 * (4096 + 4096) * 32:,}. That is the lesson's "~4M", and nearly its factor.
"""


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=str(__doc__).splitlines()[0]).parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # almost nothing is computed
    torch.manual_seed(0)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    draw(PICTURE)
    print(f"Wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
