"""The model and the rows that `gpu.py` trains on: words of the demo's, in rows as long as those of real data sets."""

import json
import math
import random
from pathlib import Path

from gpu_findings import Findings
from gpu_steps import WORK, small_config
from smollm2_model import build_smollm2
from task import ROWS_PER_STEP, Task
from transformers import AutoModelForCausalLM, AutoTokenizer

from fullft.config.options import DEMO_FOLDER

STEPS = 7
MEDIAN_WORDS, SPREAD = 150, 0.7  # of a row: a log-normal distribution, as instructions have
MOST_WORDS = 600


def prepare(findings: Findings) -> Task:
    """Write the rows, and count their tokens.

    Args:
        findings: says which model it is.
    """
    folder = WORK / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    source = model_folder(findings)
    count = STEPS * ROWS_PER_STEP
    (folder / "rows.jsonl").write_text("".join(rows(count, 10 if findings.is_emulated else 1)), encoding="utf-8")
    draft = Task(source, folder, count, 0, 0, 0.0)
    lengths, targets = [], 0
    batches = draft.batches("ours, bf16-mixed")
    for step in range(1, STEPS + 1):
        batch = batches.global_batch(step)
        lengths += [micro_batch.num_tokens for micro_batch in batch]
        targets += batch.num_target_tokens
    return Task(source, folder, count, sum(lengths), targets, sum(each**2 for each in lengths) / sum(lengths))


def model_folder(findings: Findings) -> Path:
    """Return a folder with SmolLM2-135M from its package, else with a Llama of its shape and random weights.

    Args:
        findings: is told which one.
    """
    if not findings.is_emulated:
        try:
            folder = build_smollm2()
            findings.note("The model is SmolLM2-135M.")
            return folder
        except (Exception, SystemExit) as error:
            findings.note(f"The model has SmolLM2-135M's shape and random weights, since: {error}.")
    folder = WORK / ("toy" if findings.is_emulated else "llama")
    AutoModelForCausalLM.from_config(small_config(findings.is_emulated)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_FOLDER / "model").save_pretrained(folder)
    return folder


def rows(count: int, divisor: int) -> list[str]:
    """Make rows of instructions and answers, as lines of JSON.

    Args:
        count: of rows.
        divisor: of their lengths, for toys.
    """
    chance = random.Random(0)
    words = (DEMO_FOLDER / "essay.txt").read_text(encoding="utf-8").split()
    lines = []
    for _ in range(count):
        length = min(MOST_WORDS, round(chance.lognormvariate(math.log(MEDIAN_WORDS), SPREAD))) // divisor + 8
        chosen = chance.choices(words, k=length)
        row = {"instruction": " ".join(chosen[: length // 3]), "input": "", "output": " ".join(chosen[length // 3 :])}
        lines.append(json.dumps(row) + "\n")
    return lines
