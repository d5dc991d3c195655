"""A whole run: every parameter moves, a resumed run is bitwise the uninterrupted one, the result loads elsewhere."""

import json
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import miniature, words_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import fullft.data.micro_batch as micro_batch_module
import train
from fullft.config.parse import parse_config
from fullft.errors import CheckpointError, NonFiniteError, OptionsError
from fullft.saving.checkpoint import list_checkpoints, verify

LOGGED = {
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "num_target_tokens",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
}


BY_TOKENS = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, "global_batch_size": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty rows of uneven length: 19 to train on, in 5 global batches of 4 (the last one of 3), and 1 held out."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"Count to {n}: ", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(1, 21)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def train_demo(output_dir: Path, rows: Path, is_small: bool = True, **options: Any) -> list[dict[str, Any]]:
    """Train the demo's GPT-2 (with dropout), or its miniature, on the rows, and return the log."""
    options = {
        "dataset": rows,
        "output_dir": output_dir,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
        "logging_steps": 1,
        "save_steps": 3,
        "save_total_limit": 10,
        "eval_steps": 3,
        **options,
    }
    with miniature() if is_small else nullcontext():
        train.main(parse_config(words_of({name: value for name, value in options.items() if value is not None})))
    return read_log(output_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A run in fp32, with checkpoints 3, 6 and 7; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_demo(folder, rows)
    return folder


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_clocks(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in ("tokens_per_second", "memory_bytes")} for record in log]


def test_a_run_moves_and_exports_every_parameter(tmp_path: Path, rows: Path) -> None:
    output = tmp_path / "run"
    log = train_demo(output, rows, is_small=False)
    steps = [record for record in log if "loss" in record]
    evaluations = [record for record in log if "eval_loss" in record]

    # The log is the contract's.
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert all(set(record) == LOGGED for record in steps)
    assert [record["step"] for record in evaluations] == [0, 3, 6, 7]
    assert all(set(record) == {"step", "eval_loss", "eval_perplexity"} for record in evaluations)
    assert evaluations[0]["eval_perplexity"] == pytest.approx(math.exp(evaluations[0]["eval_loss"]))
    assert steps[4]["epoch"] == 1.0

    # Every parameter moved, from the first checkpoint to the last.
    first, last = (load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (3, 7))
    assert [name for name in first if torch.equal(first[name], last[name])] == []

    # The final folder is a model that transformers loads, and it is the last checkpoint's.
    final = AutoModelForCausalLM.from_pretrained(output)
    checkpoint = AutoModelForCausalLM.from_pretrained(output / "checkpoint-7")
    ids = AutoTokenizer.from_pretrained(output)("Count to 3: ", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(final(ids).logits, checkpoint(ids).logits)
    assert final.config.use_cache is not False
    assert AutoTokenizer.from_pretrained(output).chat_template is not None

    # The other records are there.
    results = json.loads((output / "train_results.json").read_text())
    assert results["eval_loss_before"] == evaluations[0]["eval_loss"]
    assert results["eval_loss_after"] == evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert all(sample["before"] is not None and sample["after"] is not None for sample in results["samples"])
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*.bin")) and not list(output.glob("*.pt*")) and not list(output.glob(".*"))
    assert "base_model" not in (output / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed", "packing": True, "max_length": 64, "activation_checkpointing": "selective"},
        {"precision": "bf16-true", "activation_checkpointing": "full"},
        pytest.param(
            {"precision": "bf16-true", "master_weights": "stochastic", "offload": "optimizer=disk,gradients=host"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"precision": "bf16-true", "optim": "paged_adamw_8bit"}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16-true", "master_weights": "none"}, marks=pytest.mark.slow),
        pytest.param({"precision": "fp32", "optim": "adamw_8bit"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "fp32",
)
def test_resuming_is_bitwise_the_uninterrupted_run(
    tmp_path: Path, rows: Path, finished: Path, options: dict[str, Any]
) -> None:
    whole = tmp_path / "whole" if options else finished
    log = train_demo(whole, rows, **options) if options else read_log(finished)
    require_same_when_resumed(whole, tmp_path / "resumed", rows, log, options)


@pytest.mark.parametrize(
    "options",
    [
        {**BY_TOKENS, "micro_batch_tokens": 60},
        {},  # two rows at a time, by number
        pytest.param({"compile": "true"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resuming_flat_micro_batches_is_bitwise_the_uninterrupted_run(
    tmp_path: Path, rows: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    whole, strategies = tmp_path / "whole", {"eval_strategy": "steps", "save_strategy": "steps"}
    options = {"model": model_folder, "max_length": 64, **strategies, **options}
    log = train_demo(whole, rows, **options)
    dealt = (
        r"in at most \d micro-batches of at most 60 tokens" if "micro_batch_tokens" in options else "2 x 2 x 1 device"
    )
    assert re.search(dealt, capsys.readouterr().out)
    memory = json.loads((whole / "memory.json").read_text())
    assert "compile" in options or memory["planned"]["peak_bytes"] == memory["measured"]["peak_bytes"]
    torch._dynamo.reset()  # as another process begins
    require_same_when_resumed(whole, tmp_path / "resumed", rows, log, options)


def require_same_when_resumed(
    whole: Path, resumed: Path, rows: Path, log: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    """Resume a run from its third step, and compare what it writes with what the whole run has written."""
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")  # in the midst of the first epoch
    shutil.copy(whole / "log.jsonl", resumed / "log.jsonl")
    torch.manual_seed(999)
    resumed_log = train_demo(resumed, rows, **options, resume_from_checkpoint="newest")
    assert without_clocks(resumed_log) == without_clocks(log)
    for file in ("model.safetensors", "optimizer.safetensors"):
        expected, found = (load_file(folder / "checkpoint-7" / file) for folder in (whole, resumed))
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    has_8_bits = any(values.dtype == torch.uint8 for values in expected.values())  # of the optimizer's states
    assert has_8_bits == ("optim" in options)


def test_resuming_with_other_random_numbers_is_another_run(
    tmp_path: Path, rows: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: dropout draws other masks, and the weights differ."""
    whole = tmp_path / "whole"
    shutil.copytree(finished, whole)
    expected = load_file(whole / "checkpoint-7" / "model.safetensors")
    monkeypatch.setattr(micro_batch_module, "_seed_of", lambda seed, step, number: number)
    train_demo(whole, rows, resume_from_checkpoint=whole / "checkpoint-3")
    found = load_file(whole / "checkpoint-7" / "model.safetensors")
    assert not all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_damaged_checkpoint_is_passed_over_or_refused(tmp_path: Path, rows: Path, finished: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    assert [folder.name for folder in list_checkpoints(output)] == ["checkpoint-7", "checkpoint-6", "checkpoint-3"]
    weights = output / "checkpoint-7" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit
    weights.write_bytes(content)
    (output / "checkpoint-6" / "optimizer.safetensors").unlink()
    for step, message in (
        (7, "model.safetensors is damaged"),
        (6, "lacks optimizer.safetensors"),
        (5, "no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            verify(output / f"checkpoint-{step}")
    log = train_demo(output, rows, resume_from_checkpoint="newest")  # from step 3
    assert [record["step"] for record in log if "loss" in record] == [1, 2, 3, 4, 5, 6, 7]
    assert verify(output / "checkpoint-7").state["step"] == 7


def test_resuming_with_other_options_must_be_allowed(tmp_path: Path, rows: Path) -> None:
    output, rows = tmp_path / "run", Path(shutil.copy(rows, tmp_path))
    train_demo(output, rows, max_steps=3)
    with pytest.raises(OptionsError, match="learning_rate was 0.003, is 0.001"):
        train_demo(output, rows, max_steps=3, learning_rate=1e-3, resume_from_checkpoint="newest")
    rows.write_text(rows.read_text().replace("Count to", "Now count to"))
    with pytest.raises(CheckpointError, match="data has changed"):
        train_demo(output, rows, max_steps=3, resume_from_checkpoint="newest")
    log = train_demo(output, rows, max_steps=5, resume_from_checkpoint="newest", allow_changes=True)
    assert [record["step"] for record in log if "loss" in record] == [1, 2, 3, 4, 5]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, rows: Path) -> None:
    train_demo(tmp_path / "run", rows, max_steps=5, save_steps=2, save_total_limit=2)
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["checkpoint-5", "checkpoint-4"]


def test_a_non_finite_step_spares_the_last_checkpoint(tmp_path: Path, rows: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="the step was not taken"):
        train_demo(output, rows, learning_rate=1e30, lr_scheduler_type="constant", warmup_steps=0, save_steps=1)
    newest = verify(list_checkpoints(output)[0])
    weights = load_file(newest.folder / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_packing_trains_the_same_tokens_in_fewer_sequences(tmp_path: Path, rows: Path) -> None:
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 1, "val_size": 0, "eval_strategy": "no"}
    plain = train_demo(tmp_path / "plain", rows, **options)
    packed = train_demo(tmp_path / "packed", rows, **options, packing=True, max_length=128)
    assert sum(record["num_target_tokens"] for record in plain) == sum(r["num_target_tokens"] for r in packed)
    assert sum(record["num_tokens"] for record in plain) == sum(record["num_tokens"] for record in packed)
    assert len(packed) < len(plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_a_run_on_the_gpu_resumes(tmp_path: Path, rows: Path, precision: str) -> None:
    output = tmp_path / "run"
    log = train_demo(output, rows, is_small=False, precision=precision)
    assert [record for record in log if "eval_loss" in record][-1]["eval_loss"] < log[0]["eval_loss"]
    shutil.rmtree(output / "checkpoint-7")
    resumed = train_demo(output, rows, is_small=False, precision=precision, resume_from_checkpoint="newest")
    assert resumed[-1]["eval_loss"] == pytest.approx(log[-1]["eval_loss"], rel=1e-3)
