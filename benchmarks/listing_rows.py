"""The model and the rows of `listing.py`, and the loss of a row as the loop computes it."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py
# ruff: noqa: E402
from smollm2_model import WORK, build_smollm2

from fullft.config.parse import parse_config
from fullft.data.load import load_data
from fullft.data.micro_batch import IGNORED, MicroBatch
from fullft.model.loss import LossSum

MAX_LENGTH = 512
SAMPLE = 16  # rows: one global batch of the listing

Row = dict[str, Any]
Cells = tuple[str, str, str]  # claim, the listing's figures, ours


@dataclass
class Lesson:
    """The material of every measurement.

    Attributes:
        source: the model's folder.
        model: in fp32. Measurements leave its weights unchanged, and its gradients None.
        tokenizer: with pad = eos.
        rows: those of the file.
        texts: the token ids of each row's text as the listing writes it, cut at 512, unpadded.
        ours: the same rows from `load_data`, with `input_ids`, `labels`, `row` and `truncated`.
        sample: the indices of 16 rows.
    """

    source: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    texts: list[list[int]]
    ours: datasets.Dataset
    sample: list[int]

    def our_sample(self) -> list[Row]:
        """Return the sample's rows, tokenised by us."""
        wanted = set(self.sample)
        return [row for row in self.ours if row["row"] in wanted]


def prepare(dataset: Path) -> Lesson:
    """Load the model and the rows, and draw the sample.

    Args:
        dataset: a file of Alpaca rows.
    """
    source = build_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token  # as the listing does
    rows = datasets.load_dataset("json", data_files=str(dataset), split="train").to_list()
    texts = [f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}" for row in rows]
    return Lesson(
        source,
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa").train(),
        tokenizer,
        rows,
        tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"],
        tokenise(rows, "rows", source, tokenizer),
        sorted(random.Random(0).sample(range(len(rows)), SAMPLE)),
    )


def tokenise(rows: Sequence[Row], name: str, source: Path, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """Read and tokenise rows with our own code.

    Args:
        rows: in Alpaca's format.
        name: for the file that they are written to.
        source: the model's folder.
        tokenizer: the model's.
    """
    file = WORK / f"listing-{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--model", str(source), "--dataset", str(file), "--max_length", str(MAX_LENGTH), "--val_size", "0"]
    return load_data(parse_config([*flags, "--output_dir", str(WORK / "listing")]), tokenizer).train.rows


def loss_of(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """Sum the loss over a row's target tokens, as the loop does."""
    return LossSum(model)(MicroBatch.of(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])))


def count_targets(row: Row) -> int:
    """Count a row's target tokens."""
    return sum(label != IGNORED for label in row["labels"])
