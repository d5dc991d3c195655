"""What `--plan` prints: verdicts turn at the byte, the JSON follows its contract, the screen fits the screen."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import make_config
from worst_steps import deep

from fullft.config.parse import parse_config
from fullft.errors import OptionsError
from fullft.memory import screen
from fullft.memory.choose import Plans
from fullft.memory.estimates import estimate_work
from fullft.memory.facts import find_facts
from fullft.memory.machine import CONTEXT_BYTES, Device, cards
from fullft.memory.plan import Batch, plan_step
from fullft.memory.profile import COMPONENTS
from fullft.model.source import find_config
from fullft.transforms.compilation import WORTH_IT

MISTRAL = "mistralai/Mistral-7B-v0.1"
BATCH = Batch(1, 512, 512)


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_verdicts_turn_at_the_byte() -> None:
    """Of a card, with the margin; a CPU has what it needs besides already."""
    planned = plan_step(make_config(), deep("llama"), BATCH)
    peak, facts = planned["peak_bytes"], find_facts(deep("llama"), 8)
    needs = {False: peak + 2**26 + peak // 50, True: peak + planned["host_bytes"]}
    for (is_host, need), spare in itertools.product(needs.items(), (0, -1)):
        device = Device("mine", need + spare, is_host=is_host)
        first, *others = screen.plan_object(make_config(), planned, facts, device)["verdicts"]
        assert first == {"device": "mine", "memory_bytes": need + spare, "fits": spare == 0}
        assert [each["memory_bytes"] for each in others] == [each.memory_bytes for each in cards()]
    assert cards()[2].memory_bytes == 24 * 2**30 - CONTEXT_BYTES


def test_sequences_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(OptionsError, match="pass --max_length 1024"):
        screen.largest_batch(make_config(max_length=2048), Plans(find_config(make_config(model="gpt2"))))


def test_comparison_shows_planned_and_measured_side_by_side() -> None:
    planned = plan_step(make_config(), deep("llama"), BATCH)
    measured = planned | {"at_peak": planned["at_peak"] | {"logits": 2 * planned["at_peak"]["logits"]}}
    lines = {line[:18].strip(): line.split()[-1] for line in screen.compare(planned, measured).splitlines()}
    assert lines["logits"] == "+100.00%" and lines["parameters"] == lines["all"] == "+0.00%"


# ---------------------------------------------------------------------------------------------- JSON


def test_json_follows_the_contract(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep("llama", 14).save_pretrained("tiny")
    config = parse_config(["--model", "tiny", "--plan", "--json", "--device_memory", "24GiB", "--max_length", "32"])
    screen.show_plan(config)
    shown = json.loads(capsys.readouterr().out)
    chosen = replace(config, activation_checkpointing="none", offload="none")
    chosen = replace(chosen, micro_batch_tokens=16 * 32, gradient_accumulation_steps=1)
    planned = plan_step(chosen, find_config(config), Batch(1, 32, 32).under(chosen))
    assert {name: shown[name] for name in planned} == planned
    assert set(shown) == {*planned, "model", "options", "verdicts"}
    assert set(shown["at_peak"]) == set(shown["components"]) == set(COMPONENTS)
    assert sum(shown["at_peak"].values()) == shown["peak_bytes"]
    assert shown["options"]["activation_checkpointing"] == "none"
    assert shown["model"] == "tiny" and len(shown["verdicts"]) == 8
    assert shown["verdicts"][0] == {"device": "24GiB card", "memory_bytes": 47 * 2**29, "fits": True}


def test_json_has_what_gpus_and_price_ask_for(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep("llama").save_pretrained("tiny")
    words = ["--model", "tiny", "--plan", "--json", "--max_length", "32", "--gpus", "3", "--gpu_hour_price", "2"]
    words += ["--per_device_train_batch_size", "1"]  # of one micro-batch no sums are kept
    screen.show_plan(parse_config(words))
    shown = json.loads(capsys.readouterr().out)
    zero, sent = shown["zero_bytes_per_gpu"], shown["traffic_per_step"]
    assert zero["gpus"] == 3 and zero["stage_1"] > zero["stage_2"] > zero["stage_3"]
    stages = {"optimizer": "stage_1", "gradients": "stage_2", "full": "stage_3"}
    assert shown["peak_bytes"] == zero[stages[shown["options"]["shard"]]]
    # Each of two ranks gets the third part of what the third one has.
    config = parse_config(words)
    weights = 2 * shown["num_parameters"]
    assert sent["gathered"] == pytest.approx(2 / 3 * weights, rel=3e-2) and set(sent) == {"gathered", "reduced"}
    assert "sent" not in shown and config.gpus == 3
    assert shown["cost"] == {name: 2 * hours for name, hours in shown["gpu_hours"].items()}
    assert set(shown["cost"]) == {"A100", "H100"}
    screen.show_plan(parse_config([*words, "--precision", "fp32"]))
    shown = json.loads(capsys.readouterr().out)
    assert shown["gpu_hours"] is shown["cost"] is None


@pytest.mark.slow
def test_plan_shows_whether_layers_are_compiled(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(screen, "find_levers", lambda *_: [])  # each takes a plan
    monkeypatch.setattr("fullft.transforms.compilation._lack", lambda device: "")
    words = ["--plan", "--packing", "--activation_checkpointing", "full"]
    config = parse_config(words)
    work = estimate_work(config, Plans(find_config(config)).facts(config.max_length), Batch(1, config.max_length, 0))

    def shown(*more: str) -> str:
        screen.show_plan(parse_config([*words, *more]))
        return capsys.readouterr().out

    # Recomputing, a third more, is not a reason.
    monkeypatch.setitem(WORTH_IT, "cpu", 1.01 * work.training_flops)
    assert json.loads(shown("--json"))["options"]["compile"] == "false" and "Compile" not in shown()
    monkeypatch.setitem(WORTH_IT, "cpu", 0.99 * work.training_flops)
    assert json.loads(shown("--json"))["options"]["compile"] == "true"
    assert "Compiled: the decoder layers" in shown()
    assert "Compile" not in shown("--device_memory", "24GiB")  # which would gain by longer runs
    monkeypatch.setitem(WORTH_IT, "cuda", 0.99 * work.training_flops)
    monkeypatch.setitem(WORTH_IT, "cpu", math.inf)
    assert "Compiled: the decoder layers" in shown("--device_memory", "24GiB") and "Compile" not in shown()
    monkeypatch.setattr("fullft.transforms.compilation._lack", lambda device: "a compiler")
    with pytest.raises(OptionsError, match="needs a compiler"):
        shown("--compile", "true")


# ---------------------------------------------------------------------------------------------- text


@pytest.mark.slow
def test_small_models_are_shown_in_mib(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen.show_plan(parse_config(["--plan"]))
    shown = capsys.readouterr().out
    assert "MiB = 2^20 bytes, MB = 10^6" in " ".join(shown.split()) and "GiB" not in shown
    (parameters,) = [line for line in shown.splitlines() if line.startswith("parameters")]
    assert "3.02 MiB" in parameters


def test_gpu_hours_state_what_they_include() -> None:
    for mode, told in (("none", "of peak: A100"), ("full", "of peak, with recomputation: A100")):
        config = make_config(model="gpt2", activation_checkpointing=mode)
        assert told in screen._time(config, Plans(find_config(config)), BATCH)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ["--model", "gpt2", "--per_device_train_batch_size", "4", "--device_memory", "24GiB", "--gpus", "16"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model", MISTRAL, "--device_memory", "24GiB", "--gpu_hour_price", "2.5"], marks=pytest.mark.slow
        ),
    ],
    ids=["every lever", "fits nowhere"],
)
def test_screen_fits_46_lines_of_100_columns(
    words: list[str], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen.show_plan(parse_config([*words, "--plan"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 46 and max(map(len, lines)) <= 100, max(lines, key=len)
    text = "\n".join(lines)
    assert ("offloading aside: A100" in " ".join(text.split())) == (MISTRAL in words)
    gpus = ("--shard over 16 ranks on 2 machines", "full (ZeRO-3)", "50 GB/s per rank to others (assumed)")
    shown = gpus if "--gpus" in words else ("Several GPUs: --gpus N",)
    for part in ("GiB = 2^30", "LoRA", "24GiB card", "141 GB card", "A100", *shown, *words[1:2]):
        assert part in " ".join(text.split())
