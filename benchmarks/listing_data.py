"""Measurements of `listing.py` on the data: padding, its cost, dropped inputs, missing EOS, packed documents.

Each function sets the listing's way next to ours, and returns lines of the table.
"""

import random
import time
from pathlib import Path
from typing import Any

import torch
from listing_rows import MAX_LENGTH, SAMPLE, Cells, Lesson, count_targets, loss_of, tokenise
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForLanguageModeling, PreTrainedModel

from fullft.data.micro_batch import IGNORED

DOCUMENT = 48  # tokens of each packed document


def padding_in_the_loss(lesson: Lesson) -> list[Cells]:
    """Measure the share of padding, and the first loss with and without it."""
    lengths = [len(ids) for ids in lesson.texts]
    share = 1 - sum(lengths) / (MAX_LENGTH * len(lengths))
    every: list[float] = []
    real: list[float] = []
    for index in lesson.sample:
        ids = lesson.texts[index]
        padded = torch.full((1, MAX_LENGTH), lesson.tokenizer.pad_token_id)
        padded[0, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(MAX_LENGTH) < len(ids)).long()[None]
        with torch.no_grad():
            logits = lesson.model(input_ids=padded, attention_mask=mask, use_cache=False).logits
            losses = cross_entropy(logits[0, :-1], padded[0, 1:], reduction="none")
        every += losses.tolist()
        real += losses[: len(ids) - 1].tolist()
    with torch.no_grad():
        own = lesson.our_sample()
        ours = sum(float(loss_of(lesson.model, row)) for row in own) / sum(count_targets(row) for row in own)
    return [
        (
            f"padding to {MAX_LENGTH} fills the batch with padding",
            f"{share:.1%} of positions (all {len(lengths)} rows, mean {sum(lengths) / len(lengths):.0f} tokens)",
            "0% at micro-batch 1",
        ),
        (
            "`labels = input_ids.copy()` trains on it: the first loss",
            f"{sum(every) / len(every):.2f} (without padding: {sum(real) / len(real):.2f})",
            f"{ours:.2f} (answers and EOS alone)",
        ),
    ]


def cost_of_padding(lesson: Lesson) -> list[Cells]:
    """Measure compute per real token, padded and unpadded."""
    # A transformer's cost is a L + b L^2, so that two counts give the cost of every length.
    short, long = 64, MAX_LENGTH
    per_short, per_long = (_flops(lesson.source, length) / length for length in (short, long))
    quadratic = (per_long - per_short) / (long - short)
    linear = per_short - short * quadratic
    tokens = sum(len(ids) for ids in lesson.texts)
    dynamic = sum(linear * len(ids) + quadratic * len(ids) ** 2 for ids in lesson.texts)
    padded = per_long * long * len(lesson.texts)
    # Two rows of about the mean length are enough to measure time.
    mean = tokens / len(lesson.texts)
    typical = sorted(lesson.texts, key=lambda ids: abs(len(ids) - mean))[:2]
    seconds = {length: sum(_seconds(lesson.model, ids, length) for ids in typical) for length in (MAX_LENGTH, 0)}
    real = sum(len(ids) for ids in typical)
    return [
        (
            "padding costs compute: forward and backward, FLOPs per real token (all rows, counted)",
            f"{padded / tokens / 1e9:.2f} G, {padded / dynamic:.2f} times as many",
            f"{dynamic / tokens / 1e9:.2f} G",
        ),
        (
            f"the same in CPU seconds per 1000 real tokens (rows of {' and '.join(str(len(ids)) for ids in typical)})",
            f"{1000 * seconds[MAX_LENGTH] / real:.1f} s, {seconds[MAX_LENGTH] / seconds[0]:.2f} times as long",
            f"{1000 * seconds[0] / real:.1f} s",
        ),
    ]


def _flops(source: Path, length: int) -> int:
    """Count the operations of forward and backward of one row, without weights or arithmetic."""
    with torch.device("meta"):
        # Matrix products of eager attention are counted. With a 4-D mask no values are read.
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), attn_implementation="eager")
        inputs = {
            "input_ids": torch.zeros(1, length, dtype=torch.int64),
            "position_ids": torch.arange(length)[None],
            "attention_mask": torch.zeros(1, 1, length, length),
        }
        with FlopCounterMode(display=False) as counter:
            model(**inputs, use_cache=False).logits.sum().backward()
    return int(counter.get_total_flops())


def _seconds(model: PreTrainedModel, ids: list[int], padded_to: int) -> float:
    labels = [*ids, *[IGNORED] * (padded_to - len(ids))]
    row = {"input_ids": [*ids, *[0] * (padded_to - len(ids))], "labels": labels}
    start = time.process_time()  # of all threads; other programs disturb it less than the clock
    loss_of(model, row).backward()
    seconds = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return seconds


def dropped_input(lesson: Lesson) -> list[Cells]:
    """Count rows with an incomplete question, and measure the loss of their answers."""
    with_input = [index for index, row in enumerate(lesson.rows) if row.get("input")]
    chosen = random.Random(0).sample(with_input, min(SAMPLE, len(with_input)))
    whole = [lesson.rows[index] for index in chosen]
    means = []
    for name, rows in (("with-input", whole), ("without-input", [{**row, "input": ""} for row in whole])):
        tokenised = list(tokenise(rows, name, lesson.source, lesson.tokenizer))
        with torch.no_grad():
            total = sum(float(loss_of(lesson.model, row)) for row in tokenised)
        means.append(total / sum(count_targets(row) for row in tokenised))
    return [
        ("the prompt drops `input`", f"{len(with_input)} of {len(lesson.rows)} rows lose part of the question", "0"),
        (f"loss of the answers ({len(chosen)} such rows)", f"{means[1]:.3f}", f"{means[0]:.3f}"),
    ]


def lost_eos(lesson: Lesson) -> list[Cells]:
    """Count the rows that teach the model to stop."""
    eos = lesson.tokenizer.eos_token_id
    as_listed = sum(ids[-1] == eos for ids in lesson.texts)
    # The usual repair appends EOS, and masks padding in the collator, by id.
    collate = DataCollatorForLanguageModeling(lesson.tokenizer, mlm=False)
    with_eos = [{"input_ids": [*ids[: MAX_LENGTH - 1], eos]} for ids in lesson.texts]
    labels = collate(with_eos)["labels"]
    ours = sum(row["labels"][-1] == eos for row in lesson.ours)
    return [
        (
            "rows whose EOS is a target",
            f"{as_listed} as listed; {int((labels == eos).any(dim=1).sum())} of {len(labels)} with EOS appended and "
            "a collator that masks pad = eos by id",
            f"{ours} of {len(lesson.ours)} ({sum(lesson.ours['truncated'][:])} rows are cut at {MAX_LENGTH})",
        )
    ]


@torch.no_grad()
def packing_leaks(lesson: Lesson) -> list[Cells]:
    """Measure how much a document's logits depend on the document packed before it."""
    first, other, second = [ids[:DOCUMENT] for ids in lesson.texts if len(ids) >= DOCUMENT][:3]
    positions = torch.arange(DOCUMENT).repeat(2)[None]
    calls: dict[str, dict[str, Any]] = {
        "plain": {"use_cache": False},
        "cache": {"position_ids": positions},
        "ones": {"position_ids": positions, "use_cache": False, "attention_mask": torch.ones_like(positions)},
        "ours": {"position_ids": positions, "use_cache": False},
    }
    leaks = {}
    for name, arguments in calls.items():
        seen, changed = (
            lesson.model(input_ids=torch.tensor([document + second]), **arguments).logits[0, DOCUMENT:]
            for document in (first, other)
        )
        leaks[name] = float((seen - changed).abs().max())
    return [
        (
            "packed documents see each other: largest change of B's logits when A changes",
            f"{leaks['plain']:.2g} concatenated; {leaks['cache']:.2g} with restarting positions and the default cache; "
            f"{leaks['ones']:.2g} with them and an all-ones mask",
            f"{leaks['ours']:.2g}",
        )
    ]
