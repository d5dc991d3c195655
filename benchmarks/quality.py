"""Measure what precision, master weights, 8-bit states and LoRA do to the result: one real model, trained ten ways.

    python benchmarks/quality.py --dataset alpaca.json --plot quality.png   # all runs: hours on two cores
    python benchmarks/quality.py --dataset alpaca.json --only split         # those with this in their names

Each run trains SmolLM2-135M-Instruct on the same 200 steps of Alpaca rows. One table and one picture show the loss on
held-out rows, before and after. A full run is one of `train.py`, in a process and a folder of its own. The LoRA run is
`train.py`'s loop over peft's adapters. Finished runs are not repeated, so a stopped command continues.
"""

# ruff: noqa: E402
import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2_model import WORK, build_smollm2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FOLDER = WORK / "quality"
EVALUATIONS = 4  # at equal intervals

# Rows are trained one by one, so that none is padded. No option depends on the memory that happens to be free.
OPTIONS = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", "--max_length", "256"]
OPTIONS += ["--activation_checkpointing", "none", "--offload", "none", "--compile", "false", "--logging_steps", "1"]
OPTIONS += ["--save_strategy", "no", "--overwrite_output_dir", "--eval_strategy", "steps"]

# ---------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One way to train.

    Attributes:
        name: for the table, and of its folder.
        flags: of `train.py`, besides `OPTIONS`.
        rate: learning rate.
        kept: bytes of weights and optimizer states per parameter, as text.
        style: its colour and dashes in the picture.
    """

    name: str
    flags: tuple[str, ...]
    rate: str
    kept: str
    style: tuple[str, str]

    @property
    def is_lora(self) -> bool:
        """Whether it trains adapters."""
        return self.name.startswith("LoRA")


_BLUE, _GREEN, _ORANGE, _RED, _GREY, _VIOLET = "#1f5a99", "#4c9a4c", "#f2a541", "#d9602b", "#9a9a9a", "#a892c7"
_FP32 = ("--precision", "fp32")
_LOW = "1e-6"  # an update is small here, compared with the gaps between bf16 numbers


def _bf16(masters: str) -> tuple[str, ...]:
    return ("--precision", "bf16-true", "--master_weights", masters)


RUNS = [
    Run("fp32", _FP32, "2e-5", "12", (_BLUE, "-")),
    Run("bf16-mixed", ("--precision", "bf16-mixed"), "2e-5", "12", (_GREEN, "-")),
    Run("bf16-true split", _bf16("split"), "2e-5", "12", (_ORANGE, "--")),
    Run("bf16-true stochastic", _bf16("stochastic"), "2e-5", "10", (_VIOLET, "-")),
    Run("bf16-true none", _bf16("none"), "2e-5", "6", (_RED, "-")),
    Run("bf16-true split 8-bit", (*_bf16("split"), "--optim", "adamw_8bit"), "2e-5", "7.3", (_GREY, "--")),
    Run("LoRA r=8 on q, v (fp32)", (), "2e-4", "4 + 12 per adapter's", ("black", ":")),
    Run(f"fp32 at {_LOW}", _FP32, _LOW, "12", (_BLUE, "-")),
    Run(f"bf16-true split at {_LOW}", _bf16("split"), _LOW, "12", (_ORANGE, "--")),
    Run(f"bf16-true none at {_LOW}", _bf16("none"), _LOW, "6", (_RED, "-")),
]


def folder_of(run: Run, steps: int) -> Path:
    """Return the folder of a run."""
    return FOLDER / f"{steps}-steps" / run.name.lower().translate(str.maketrans(" ", "-", "=,()"))


def flags_of(run: Run, source: Path, dataset: str, steps: int) -> list[str]:
    """Return a run's command line for `train.py`."""
    flags = ["--model", str(source), "--dataset", dataset, "--output_dir", str(folder_of(run, steps))]
    flags += [*OPTIONS, "--eval_steps", str(max(1, steps // EVALUATIONS)), "--max_steps", str(steps)]
    return [*flags, "--learning_rate", run.rate, *run.flags]


def carry_out(run: Run, source: Path, dataset: str, steps: int) -> None:
    """Train, unless the run is finished."""
    if (folder_of(run, steps) / "train_results.json").is_file():
        print(f"{run.name}: done before", flush=True)
        return
    flags = flags_of(run, source, dataset, steps)
    if run.is_lora:
        flags = [*flags, "--precision", "fp32"]
        print(f"{run.name}: by {Path(__file__).name} itself", flush=True)
        return train_lora(flags, folder_of(run, steps))
    shown = [flag.removeprefix(f"{ROOT}/") for flag in flags]
    print(f"{run.name}: python train.py {shlex.join(shown)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True)


# ---------------------------------------------------------------------------------------------- LoRA


def train_lora(flags: list[str], folder: Path) -> None:
    """Train adapters with `train.py`'s loop, and write the files that the table reads.

    Args:
        flags: as for `train.py`.
        folder: where to write.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        print("LoRA needs peft: pip install peft; its row is left out", flush=True)
        return
    import torch

    from fullft.config.parse import parse_config
    from fullft.config.steps import Steps
    from fullft.data.load import load_data
    from fullft.hardware import peak_bytes
    from fullft.model.load import load_model
    from fullft.model.loss import LossSum
    from fullft.model.precision import autocast_of
    from fullft.model.source import load_tokenizer
    from fullft.optim.schedule import build_schedule
    from fullft.run.evaluation import evaluate
    from fullft.storage.tiers import Storage

    config, device = parse_config(flags), torch.device("cpu")
    data = load_data(config, load_tokenizer(config, str(config.model)))
    torch.manual_seed(config.seed)
    model = load_model(config, str(config.model), Storage(device, folder))
    get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )  # this puts the adapters into the model itself
    loss_sum = LossSum(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
    steps = Steps(config, data.train.steps_per_epoch)
    learning_rate_at = build_schedule(config, steps.total)
    autocast = autocast_of(config.numerics, device)
    records: list[dict[str, Any]] = []
    seconds, num_tokens = 0.0, 0

    def note_evaluation(step: int) -> None:
        loss = evaluate(model, loss_sum, data.evaluation, autocast)
        assert loss is not None, "no row is held out"
        records.append({"step": step, "eval_loss": float(loss)})

    note_evaluation(0)
    for step in range(1, steps.total + 1):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        batch = data.train.global_batch(step)
        loss = torch.zeros(())
        for micro_batch in batch:
            with autocast:
                micro_loss = loss_sum(micro_batch) / batch.num_target_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        num_tokens += batch.num_tokens
        records.append({"step": step, "loss": float(loss)})
        if steps.evaluation_due(step):
            note_evaluation(step)
    results = {"num_parameters": sum(parameter.numel() for parameter in trained)}
    results |= {"tokens_per_second": num_tokens / seconds, "peak_memory_bytes": peak_bytes(device)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (folder / "train_results.json").write_text(json.dumps(results), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- reports


def read(run: Run, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a finished run's results and the records of its log."""
    folder = folder_of(run, steps)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads((folder / "train_results.json").read_text(encoding="utf-8")), log


def table(runs: list[Run], steps: int) -> list[tuple[str, ...]]:
    """Make the table's rows: the loss that each run reached, and its gain compared with fp32's at the same rate."""
    gains = {}
    rows: list[tuple[str, ...]] = [
        (
            "run",
            "learning rate",
            "trained",
            "B/param",
            "held-out before",
            "after",
            "gain, % of fp32's",
            "tokens/s",
            "peak",
        ),
        ("---", *["---:"] * 8),
    ]
    for run in runs:
        results, log = read(run, steps)
        losses = [record["eval_loss"] for record in log if "eval_loss" in record]
        gains[run.name] = losses[0] - losses[-1]
        reference = gains.get("fp32" if run.rate != _LOW else f"fp32 at {_LOW}")
        share = f"{gains[run.name] / reference:.1%}" if reference else "?"
        rows.append(
            (
                run.name,
                run.rate,
                f"{results['num_parameters'] / 1e6:.1f}M",
                run.kept,
                f"{losses[0]:.4f}",
                f"{losses[-1]:.4f}",
                share,
                f"{results['tokens_per_second']:.0f}",
                f"{results['peak_memory_bytes'] / 2**30:.2f} GiB",
            )
        )
    return rows


def plot(runs: list[Run], steps: int, file: Path) -> None:
    """Draw the held-out loss of each run over its steps, one panel per kind of learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 5.6), layout="constrained")
    titles = ("learning rate 2e-5 (LoRA: 2e-4)", f"learning rate {_LOW}")
    for axes, title, is_low in zip(panels, titles, (False, True), strict=True):
        for run in [run for run in runs if (run.rate == _LOW) == is_low]:
            points = [(record["step"], record["eval_loss"]) for record in read(run, steps)[1] if "eval_loss" in record]
            colour, dashes = run.style
            label = f"{points[-1][1]:.4f}  {run.name.removesuffix(f' at {_LOW}')}"
            axes.plot(*zip(*points, strict=True), dashes, color=colour, marker="o", markersize=3.5, label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("optimizer step")
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            # Below the axes, it hides no line.
            place = {"loc": "upper left", "bbox_to_anchor": (0, -0.12), "ncols": 2, "alignment": "left"}
            axes.legend(title="loss at the end", frameon=False, fontsize=8, title_fontsize=8, **place)
    panels[0].set_ylabel("held-out loss, nats per token")
    figure.suptitle("SmolLM2-135M-Instruct on Alpaca rows: held-out loss", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Carry out the runs that are not finished, then print the table and draw the picture of all that are."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset", required=True, help="Alpaca rows, from any source that train.py reads")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run, of 4 rows (200)")
    parser.add_argument("--only", default="", help="runs with this in their names (default: all)")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    source = build_smollm2()
    for run in RUNS:
        if arguments.only in run.name:
            carry_out(run, source, str(arguments.dataset), arguments.steps)
    done = [run for run in RUNS if (folder_of(run, arguments.steps) / "train_results.json").is_file()]
    print(
        f"\nSmolLM2-135M-Instruct, {arguments.steps} steps of 4 rows of at most 256 tokens; loss in nats per token.\n"
        "B/param: bytes of weights and states, without gradients. With 8-bit states, embeddings keep fp32 moments.\n"
        "Peak: of the resident set. GiB = 2^30 bytes\n"
    )
    for cells in table(done, arguments.steps):
        print(f"| {' | '.join(cells)} |")
    if arguments.plot is not None:
        plot(done, arguments.steps, arguments.plot)


if __name__ == "__main__":
    main()
