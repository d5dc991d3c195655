"""The throughput benchmark's task: which model and rows all systems train on, and with which options ours do.

Nothing is imported here but what fullft itself needs: `gpu.py` uses it where no peer is installed.
"""

# ruff: noqa: E402
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py

from fullft.config.parse import parse_config
from fullft.data.batches import Batches
from fullft.data.load import load_data

ROWS_PER_STEP = 16
MAX_LENGTH = 1024  # of a row, and of a packed sequence

_MIXED, _SPLIT, _FP32 = "--precision bf16-mixed", "--precision bf16-true --master_weights split", "--precision fp32"
_AT_ONCE = "--per_device_train_batch_size {sequences} --gradient_accumulation_steps 1"  # all of a step's tokens
DEFAULT = "ours, the default command"  # decides by itself how it runs; others are told
# Each line is a row of the table, with its options for `train.py` besides `COMMON`. Trainer gets the first one's rows.
OURS = {
    DEFAULT: "",
    f"{DEFAULT}, compiled": "--compile true",  # as it is chosen for runs of more than some minutes
    f"{DEFAULT}, bf16-mixed": _MIXED,
    f"{DEFAULT}, bf16-mixed, compiled": f"{_MIXED} --compile true",
    "ours, bf16-mixed": _MIXED,
    "ours, bf16-mixed, packing": f"{_MIXED} --packing",
    "ours, bf16-mixed, packing, compiled": f"{_MIXED} --packing --compile true",
    "ours, bf16-mixed, packing, compiled, steps of one micro-batch": f"{_MIXED} --packing --compile true {_AT_ONCE}",
    "ours, bf16-true": _SPLIT,
    "ours, bf16-true, packing": f"{_SPLIT} --packing",
    "ours, bf16-true, packing, compiled": f"{_SPLIT} --packing --compile true",
    "ours, bf16-true, packing, compiled, steps of one micro-batch": f"{_SPLIT} --packing --compile true {_AT_ONCE}",
    "ours, bf16-true, packing, selective checkpointing": f"{_SPLIT} --packing --activation_checkpointing selective",
    "ours, bf16-true, packing, full checkpointing": f"{_SPLIT} --packing --activation_checkpointing full",
    "ours, bf16-true, packing, compiled, full checkpointing": (
        f"{_SPLIT} --packing --compile true --activation_checkpointing full"
    ),
    "ours, fp32, packing, compiled": f"{_FP32} --packing --compile true",
    "ours, fp32, packing, compiled, steps of one micro-batch": f"{_FP32} --packing --compile true {_AT_ONCE}",
}
# Nothing but training is done.
COMMON = (
    "--val_size 0 --num_train_epochs 1 --learning_rate 2e-5 --max_grad_norm 1 --eval_strategy no --save_strategy no "
    f"--logging_steps 1 --max_length {MAX_LENGTH} --overwrite_output_dir"
)
# No option depends on the memory that happens to be free.
TOLD = "--per_device_train_batch_size 1 --activation_checkpointing none --offload none --compile false"


@dataclass(frozen=True)
class Task:
    """The model and the rows that all systems train on.

    Attributes:
        source: the model's folder.
        folder: for the rows and the results.
        rows: their number in the file that all systems read.
        tokens: in those rows, as we tokenise them.
        targets: the tokens among them that are learned.
        mean_context: tokens of the document that the average token is in. Attention's cost follows it.
    """

    source: Path
    folder: Path
    rows: int
    tokens: int
    targets: int
    mean_context: float

    @property
    def file(self) -> Path:
        """The file of rows."""
        return self.folder / "rows.jsonl"

    @property
    def mean_length(self) -> int:
        """Tokens of the average row."""
        return round(self.tokens / self.rows)

    @property
    def packed_sequences(self) -> int:
        """Packed sequences that hold about as many tokens as a step's rows."""
        return max(1, round(ROWS_PER_STEP * self.tokens / self.rows / MAX_LENGTH))

    def output_dir(self, name: str) -> Path:
        """Return the folder that a run of ours writes to."""
        return self.folder / slug(name)

    def flags(self, name: str) -> list[str]:
        """Return a run's command line for `train.py`."""
        flags = ["--model", str(self.source), "--dataset", str(self.file), "--output_dir", str(self.output_dir(name))]
        flags += COMMON.split()
        if DEFAULT not in name:
            accumulation = self.packed_sequences if is_packed(name) else ROWS_PER_STEP
            flags += [*TOLD.split(), "--gradient_accumulation_steps", str(accumulation)]
        return [*flags, *OURS[name].format(sequences=self.packed_sequences).split()]

    def batches(self, name: str) -> Batches:
        """Return the batches that `train.py` trains on."""
        return load_data(parse_config(self.flags(name)), AutoTokenizer.from_pretrained(self.source)).train


def is_packed(name: str) -> bool:
    """Return whether one of ours packs its rows."""
    return "--packing" in OURS[name]


def slug(name: str) -> str:
    """Turn a system's name into a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
