"""What the usual listing of full fine-tuning gets wrong, measured on a real model and real rows.

    python benchmarks/listing.py --dataset alpaca.json

The listing: Alpaca prompts without the `input` field, no EOS, `padding="max_length"` with `labels = input_ids.copy()`,
pad = eos, bf16 weights under torch's AdamW. Owns one measurement per claim; each sets the listing's way beside ours on
SmolLM2-135M, on a fixed sample of the rows where the whole file would take too long. Only the seconds vary by machine.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import datasets
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py
# ruff: noqa: E402
from smollm2_model import WORK, build_smollm2

from fullft.config.parse import parse_config
from fullft.data.batches import load_data
from fullft.data.micro_batch import IGNORED, MicroBatch
from fullft.model.loss import SummedCrossEntropy
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import Storage

MAX_LENGTH = 512
SAMPLE = 16  # rows: one global batch of the listing
DOCUMENT = 48  # tokens of each packed document

Row = dict[str, Any]


@dataclass
class Lesson:
    """What every measurement works on.

    Attributes:
        source: the model's folder.
        model: in fp32; measurements leave its weights as they are, and its gradients None.
        tokenizer: pad = eos.
        rows: of the file.
        texts: token ids of the listing's text of each row, cut at 512, unpadded.
        ours: the same rows as `load_data` makes them: `input_ids`, `labels`, `row`, `truncated`.
        sample: indices of 16 rows, drawn once.
    """

    source: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    texts: list[list[int]]
    ours: datasets.Dataset
    sample: list[int]

    def our_rows(self, indices: list[int]) -> list[Row]:
        """Give the tokenised rows of some rows of the file."""
        wanted = set(indices)
        return [row for row in self.ours if row["row"] in wanted]


def main() -> None:
    """Measure every claim, then print the table."""
    parser = argparse.ArgumentParser(description="Measure what the usual listing of full fine-tuning gets wrong.")
    found = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"
    parser.add_argument(
        "--dataset", default=found if found.is_file() else None, required=not found.is_file(), help="Alpaca rows (JSON)"
    )
    parser.add_argument("--only", default="abcdefghi", help="letters of the measurements to take (default: all)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()

    lesson = _prepare(Path(arguments.dataset))
    print(
        f"SmolLM2-135M-Instruct, {len(lesson.rows)} rows of {Path(arguments.dataset).name}; sample: {SAMPLE} of them",
        flush=True,
    )
    table = [("", "claim", "the listing", "ours")]
    for letter, measure in MEASUREMENTS.items():
        if letter in arguments.only:
            start = time.perf_counter()
            table += [(letter, *cells) for cells in measure(lesson)]
            print(f"  {letter}: {measure.__doc__.splitlines()[0]} {time.perf_counter() - start:.0f} s", flush=True)
    table.insert(1, ("---",) * 4)
    print()
    for cells in table:
        print(f"| {' | '.join(cells)} |")


# ---------------------------------------------------------------------------------------------- rows


def _prepare(dataset: Path) -> Lesson:
    source = build_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token  # as the listing does
    rows = datasets.load_dataset("json", data_files=str(dataset), split="train").to_list()
    texts = [f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}" for row in rows]
    return Lesson(
        source,
        _load(source, torch.float32),
        tokenizer,
        rows,
        tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"],
        _tokenise(rows, "rows", source, tokenizer),
        sorted(random.Random(0).sample(range(len(rows)), SAMPLE)),
    )


def _tokenise(rows: list[Row], name: str, source: Path, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """Let our own code read and tokenise rows."""
    file = WORK / f"listing-{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--model", str(source), "--dataset", str(file), "--max_length", str(MAX_LENGTH), "--val_size", "0"]
    return load_data(parse_config([*flags, "--output_dir", str(WORK / "listing")]), tokenizer).train.rows


def _load(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa").train()


def _loss_of(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """Sum the loss over a row's target tokens, as the loop does."""
    batch = MicroBatch.of(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]]))
    summed_cross_entropy = SummedCrossEntropy(model)
    return summed_cross_entropy(summed_cross_entropy.decoder(**batch.inputs, use_cache=False), batch)


def _count(row: Row) -> int:
    return len(row["labels"]) - row["labels"].count(IGNORED)


def _gradients(model: PreTrainedModel, rows: list[Row]) -> Iterator[tuple[float, list[torch.Tensor]]]:
    """Take each row's summed loss and its gradient."""
    for row in rows:
        loss = _loss_of(model, row)
        loss.backward()
        yield float(loss.detach()), [parameter.grad for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)


def _norm(tensors: list[torch.Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def _relative_error(tensors: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return _norm([a.double() - b.double() for a, b in zip(tensors, exact, strict=True)]) / _norm(exact)


# ---------------------------------------------------------------------------------------------- measurements


def padding_in_the_loss(lesson: Lesson) -> list[tuple[str, str, str]]:
    """Share of padding, and the first loss with and without it."""
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
        own = lesson.our_rows(lesson.sample)
        ours = sum(float(_loss_of(lesson.model, row)) for row in own) / sum(_count(row) for row in own)
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


def cost_of_padding(lesson: Lesson) -> list[tuple[str, str, str]]:
    """Compute per real token, padded and not."""
    # A transformer's cost is a L + b L^2: two counts give every length.
    short, long = 64, MAX_LENGTH
    per_short, per_long = (_flops(lesson.source, length) / length for length in (short, long))
    quadratic = (per_long - per_short) / (long - short)
    linear = per_short - short * quadratic
    tokens = sum(len(ids) for ids in lesson.texts)
    dynamic = sum(linear * len(ids) + quadratic * len(ids) ** 2 for ids in lesson.texts)
    padded = per_long * long * len(lesson.texts)
    # Two rows of about the mean length are enough for a time.
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
    """Count forward and backward of one row; no weights, no arithmetic."""
    with torch.device("meta"):
        # Eager attention, so that its matrix products are counted; with a 4-D mask nothing looks at values.
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), attn_implementation="eager")
        inputs = {
            "input_ids": torch.zeros(1, length, dtype=torch.int64),
            "position_ids": torch.arange(length)[None],
            "attention_mask": torch.zeros(1, 1, length, length),
        }
        with FlopCounterMode(display=False) as counter:
            model(**inputs, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def _seconds(model: PreTrainedModel, ids: list[int], padded_to: int) -> float:
    labels = [*ids, *[IGNORED] * (padded_to - len(ids))]
    row = {"input_ids": [*ids, *[0] * (padded_to - len(ids))], "labels": labels}
    start = time.process_time()  # of all threads; less disturbed by other programs than the clock on the wall
    _loss_of(model, row).backward()
    seconds = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return seconds


def dropped_input(lesson: Lesson) -> list[tuple[str, str, str]]:
    """Rows whose question is incomplete, and what that does to their answers' loss."""
    with_input = [index for index, row in enumerate(lesson.rows) if row.get("input")]
    chosen = random.Random(0).sample(with_input, min(SAMPLE, len(with_input)))
    whole = [lesson.rows[index] for index in chosen]
    means = []
    for name, rows in (("with-input", whole), ("without-input", [{**row, "input": ""} for row in whole])):
        tokenised = list(_tokenise(rows, name, lesson.source, lesson.tokenizer))
        with torch.no_grad():
            total = sum(float(_loss_of(lesson.model, row)) for row in tokenised)
        means.append(total / sum(_count(row) for row in tokenised))
    return [
        ("the prompt drops `input`", f"{len(with_input)} of {len(lesson.rows)} rows lose part of the question", "0"),
        (f"loss of the answers ({len(chosen)} such rows)", f"{means[1]:.3f}", f"{means[0]:.3f}"),
    ]


def lost_eos(lesson: Lesson) -> list[tuple[str, str, str]]:
    """Rows that teach the model to stop."""
    eos = lesson.tokenizer.eos_token_id
    as_listed = sum(ids[-1] == eos for ids in lesson.texts)
    # The usual repair: append EOS, and let the collator mask padding, which it does by id.
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


def bytes_per_parameter(lesson: Lesson) -> list[tuple[str, str, str]]:
    """What weights, gradients and optimizer states really take."""
    half, full = torch.bfloat16, torch.float32
    flags = ["--model", str(lesson.source), "--output_dir", str(WORK / "listing"), "--precision", "bf16-true"]
    flags += ["--master_weights", "none"]

    def ours(optim: str):
        storage = Storage(torch.device("cpu"), WORK)
        return lambda model: build_optimizer(model, parse_config([*flags, "--optim", optim]), storage)

    def bnb(name: str):
        return lambda model: getattr(bitsandbytes.optim, name)(model.parameters())

    return [
        (
            "12 bytes per parameter, for bf16 weights and fp32 moments: torch's AdamW, measured",
            _bytes(lesson, half, lambda model: torch.optim.AdamW(model.parameters())),
            f"{_bytes(lesson, half, ours('adamw'))} (bf16-true); {_bytes(lesson, full, ours('adamw'))} (bf16-mixed)",
        ),
        (
            "whose 12 bytes those are: bitsandbytes' 32-bit AdamW",
            _bytes(lesson, half, bnb("AdamW32bit")),
            "not offered",
        ),
        (
            "bitsandbytes' 8-bit AdamW (ours keeps the embeddings, 21% of this model, in 32 bits)",
            _bytes(lesson, half, bnb("AdamW8bit")),
            _bytes(lesson, half, ours("adamw_8bit")),
        ),
    ]


def _bytes(lesson: Lesson, dtype: torch.dtype, build) -> str:
    model = copy.deepcopy(lesson.model).to(dtype)
    optimizer = build(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    parts = [
        sum(parameter.nbytes for parameter in model.parameters()),
        sum(parameter.grad.nbytes for parameter in model.parameters()),
        # Lookup tables of the 8-bit code are shared by all states: each counts once.
        sum(
            {
                value.data_ptr(): value.nbytes
                for state in optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            }.values()
        ),
    ]
    dtypes = {
        str(state[name].dtype).removeprefix("torch.")
        for state in optimizer.state.values()
        for name in ("exp_avg", "state1")
        if name in state
    }
    return f"{sum(parts) / count:.2f} B, moments in {' and '.join(sorted(dtypes))}"


def rounded_away_updates(lesson: Lesson) -> list[tuple[str, str, str]]:
    """Weights that did not move at all after a few steps."""
    rows = sorted(lesson.our_rows(lesson.sample), key=lambda row: len(row["input_ids"]))[2:6]
    start = copy.deepcopy(lesson.model).to(torch.bfloat16)
    findings = []
    for rate in (2e-5, 1e-6):
        shares = []
        for dtype in (torch.bfloat16, torch.float32):
            model = copy.deepcopy(start).to(dtype)  # both start from the same values
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
            for row in rows:
                (_loss_of(model, row) / _count(row)).backward()
                optimizer.step()
                optimizer.zero_grad()
            pairs = zip(model.parameters(), start.parameters(), strict=True)
            same = sum(int((now == before.to(dtype)).sum()) for now, before in pairs)
            shares.append(same / sum(parameter.numel() for parameter in model.parameters()))
        findings.append(
            (
                f"bf16 weights round updates away: unchanged weights after {len(rows)} steps at {rate:g}",
                f"{shares[0]:.1%}",
                f"{shares[1]:.2%} (fp32 weights, as in bf16-mixed)",
            )
        )
    return findings


def bf16_sums(lesson: Lesson) -> list[tuple[str, str, str]]:
    """Error of adding up one global batch's bf16 gradients."""
    model = copy.deepcopy(lesson.model).to(torch.bfloat16)
    rows = lesson.our_rows(lesson.sample)
    total = sum(_count(row) for row in rows)
    sums: dict[torch.dtype, list[torch.Tensor]] = {
        dtype: [torch.zeros_like(parameter, dtype=dtype) for parameter in model.parameters()]
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    for _, gradients in _gradients(model, rows):
        for own in sums.values():
            for accumulated, gradient in zip(own, gradients, strict=True):
                accumulated += (gradient / total).to(accumulated.dtype)
    exact = sums.pop(torch.float64)
    errors = {dtype: _relative_error(own, exact) for dtype, own in sums.items()}
    return [
        (
            f"gradients of {len(rows)} micro-batches are added up in bf16: relative error of the sum",
            f"{errors[torch.bfloat16]:.1e}",
            f"{errors[torch.float32]:.1e} (fp32 gradients, as in bf16-mixed)",
        )
    ]


def mean_of_means(lesson: Lesson) -> list[tuple[str, str, str]]:
    """What averaging the micro-batches' means does to loss and gradient."""
    rows = lesson.our_rows(lesson.sample)
    counts = [_count(row) for row in rows]
    one = [torch.zeros_like(parameter) for parameter in lesson.model.parameters()]
    means = [torch.zeros_like(parameter) for parameter in lesson.model.parameters()]
    losses = []
    for count, (loss, gradients) in zip(counts, _gradients(lesson.model, rows), strict=True):
        losses.append(loss)
        for first, second, gradient in zip(one, means, gradients, strict=True):
            first.add_(gradient, alpha=1 / sum(counts))
            second.add_(gradient, alpha=1 / (count * len(rows)))
    loss = sum(losses) / sum(counts)
    mean = sum(total / count for total, count in zip(losses, counts, strict=True)) / len(rows)
    return [
        (
            f"accumulating micro-batch means ({len(rows)} rows, unpadded, {min(counts)} to {max(counts)} targets)",
            f"loss {mean:.3f} instead of {loss:.3f} ({mean / loss - 1:+.1%}); gradient off by "
            f"{_relative_error(means, one):.0%}, its norm by {_norm(means) / _norm(one) - 1:+.0%}",
            f"{loss:.3f}, one divisor for all",
        )
    ]


@torch.no_grad()
def packing_leaks(lesson: Lesson) -> list[tuple[str, str, str]]:
    """How much a document's logits depend on the document packed before it."""
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


MEASUREMENTS = dict(
    zip(
        "abcdefghi",
        (
            padding_in_the_loss,
            cost_of_padding,
            dropped_input,
            lost_eos,
            bytes_per_parameter,
            rounded_away_updates,
            bf16_sums,
            mean_of_means,
            packing_leaks,
        ),
        strict=True,
    )
)


if __name__ == "__main__":
    main()
