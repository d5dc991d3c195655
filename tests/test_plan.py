"""The plan: a few layers stand for all, levers are true, verdicts turn at the byte, wrong configs are refused."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from models import make_config, tiny_model
from transformers import AutoConfig, PreTrainedConfig

from fullft import find as find_module
from fullft import loss as loss_module
from fullft.adamw import AdamW
from fullft.compilation import WORTH_IT
from fullft.config import DEMO_FOLDER, Config, parse_config, parse_size
from fullft.errors import MemoryExhaustedError, ModelError, OptionsError
from fullft.find import find_config, find_model
from fullft.memory import plan as plan_module
from fullft.memory import report
from fullft.memory.facts import find_facts
from fullft.memory.fit import Plans, choices, choose
from fullft.memory.levers import ALL, estimate_adapters, estimate_work, estimate_zero, find_levers
from fullft.memory.plan import Batch, _figures, layer_period, num_layers, plan_step, trace
from fullft.memory.room import ASSUMED, CONTEXT_BYTES, Device, Speeds, available_host_bytes, cards
from fullft.memory.run import plan_run
from fullft.memory.tracker import COMPONENTS, MemoryTracker
from fullft.memory.traffic import resting_bytes
from fullft.memory.units import GIB, MIB, unit_for
from fullft.micro_batch import MicroBatch
from train import main

# As published with the models.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "openai-community/gpt2": 124_439_808,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "distilbert/distilgpt2": 81_912_576,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}
MISTRAL = "mistralai/Mistral-7B-v0.1"
BATCH = Batch(1, 512, 512)


def deep(family: str, layers: int = 7) -> PreTrainedConfig:
    """Give a tiny config with more layers than the plan builds."""
    config = tiny_model(family, torch.float32, tied=family == "qwen2").config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % 2] for i in range(layers)]
    config.num_hidden_layers = layers
    return config


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------- bundled configs


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_bundled_config_has_the_published_number_of_parameters(name: str) -> None:
    assert find_facts(find_config(Config(model=name)), 512).parameters == PUBLISHED[name]


def test_counts_continued_from_a_few_layers_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gpt2", "gemma2", "phi"):
        continued = find_facts(deep(family, 9), 64)
        with monkeypatch.context() as patch:
            patch.setattr("fullft.memory.facts.layer_period", num_layers)  # every layer is built
            assert find_facts(deep(family, 9), 64) == continued


def test_a_folder_of_ones_own_beats_a_bundled_name(in_empty_folder: Path) -> None:
    deep("llama").save_pretrained("gpt2")
    assert find_config(Config(model="gpt2")).model_type == "llama"


# ---------------------------------------------------------------------------------------------- a few layers for all

CASES = [
    ("gpt2", {}),
    ("gpt2", {"packing": True, "activation_checkpointing": "full", "precision": "bf16-true"}),
    ("llama", {"precision": "fp32", "optim": "adamw_8bit", "gradient_accumulation_steps": 1}),
    ("llama", {"activation_checkpointing": "every_2", "packing": True}),
    ("mistral", {"precision": "bf16-true", "activation_checkpointing": "every_2", "optim": "adamw_8bit"}),
    ("qwen2", {"activation_checkpointing": "full", "gradient_accumulation_steps": 1}),
    ("gemma2", {"precision": "bf16-true", "packing": True}),
    ("gemma2", {"activation_checkpointing": "every_2", "optim": "adamw_8bit"}),
    ("qwen2", {"activation_checkpointing": "selective", "precision": "bf16-true"}),
    ("phi", {"precision": "fp32", "activation_checkpointing": "full"}),
    ("phi", {"packing": True, "optim": "adamw_8bit"}),
    ("llama", {"offload": "optimizer=host,gradients=host"}),
    ("qwen2", {"offload": "optimizer=disk,gradients=disk", "optim": "adamw_8bit"}),
    ("llama", {"offload": "parameters=host,optimizer=disk", "activation_checkpointing": "full"}),
    ("gpt2", {"offload": "gradients=released", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}),
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_plan_from_a_few_layers_is_the_trace_of_all(family: str, options: dict[str, object]) -> None:
    config, model_config, batch = make_config(**options), deep(family, 9), Batch(2, 24, 16)
    whole = _figures(trace(config, model_config, batch, 9, 9))  # no slot left out, nothing continued
    planned = plan_step(config, model_config, batch)
    if "parameters" in config.offload:
        # Of a streamed weight that is elsewhere one number is there; their count in evaluation is no line.
        numbers = planned["phases"].pop("evaluation") - whole["phases"].pop("evaluation")
        assert 0 <= numbers < 9 * 9 * torch.bfloat16.itemsize
    assert planned == whole
    assert sum(whole["at_peak"].values()) == whole["peak_bytes"] == max(whole["phases"].values())


def test_the_negative_control_one_layer_less_would_be_noticed() -> None:
    config, batch = make_config(), Batch(2, 24, 16)
    assert plan_step(config, deep("llama", 8), batch) != plan_step(config, deep("llama", 9), batch)


@pytest.mark.parametrize("offload", ["none", "optimizer=host,gradients=host", "optimizer=disk,gradients=disk"])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_a_few_chunks_stand_for_all(
    optim: str, offload: str, small_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes, by far fewer operators; the batch is small, so that the step shows."""
    config, model_config, batch = make_config(optim=optim, offload=offload), deep("llama"), Batch(1, 4)
    planned = plan_step(config, model_config, batch)

    @contextmanager
    def thoroughly(self: AdamW) -> Iterator[None]:
        for parameter in self.parameters:
            self.states_of(parameter)
        yield

    monkeypatch.setattr(AdamW, "rehearsal", thoroughly)
    whole = plan_step(config, model_config, batch)
    # But for the norm, which keeps a number of 8 bytes for each chunk that it has squared, and each row of the last.
    numbers = whole["phases"].pop("optimizer_step") - planned["phases"].pop("optimizer_step")
    chunks = sum(-(-parameter.numel() // small_chunks) for parameter in tiny_model("llama").parameters())
    assert 0 <= numbers <= 2 * 2 * 8 * chunks and whole == planned


@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("gemma2", "bf16-mixed"), ("gpt2", "bf16-true")])
@pytest.mark.parametrize("batch", [Batch(1, 17, 25), Batch(2, 20, 8), Batch(4, 16, 16)])
def test_two_chunks_of_the_loss_stand_for_all(
    family: str, precision: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    config, model_config = make_config(precision=precision, activation_checkpointing="full"), deep(family, 4)
    planned = plan_step(config, model_config, batch)
    monkeypatch.setattr(plan_module, "_two_chunks_of_the_loss_stand_for_all", nullcontext)
    assert plan_step(config, model_config, batch) == planned


def operators_of_a_plan(
    monkeypatch: pytest.MonkeyPatch, config: Config, model_config: PreTrainedConfig, batch: Batch
) -> int:
    """Count what a plan's time depends on."""
    events = []
    original = MemoryTracker.__torch_dispatch__
    with monkeypatch.context() as patch:
        patch.setattr(
            MemoryTracker,
            "__torch_dispatch__",
            lambda self, operator, *rest: (events.append(operator), original(self, operator, *rest))[1],
        )
        plan_step(config, model_config, batch)
    return len(events)


def test_a_plan_takes_as_many_operators_for_a_large_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    # Not 128 tokens: groups of these fill attention's scratch memory, and a view of all of it is no operator.
    large, small = (
        operators_of_a_plan(monkeypatch, make_config(), deep("llama", 4), batch)
        for batch in (Batch(16, 96, 96), Batch(2, 16, 16))
    )
    assert large == small


@pytest.mark.parametrize("offload", ["none", "optimizer=host,gradients=host", "optimizer=disk,gradients=disk"])
def test_a_plan_takes_as_many_operators_for_large_tensors(
    offload: str, small_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks and tiles stand for each other, in the sums of gradients as in the norm and the step."""

    def operators(vocabulary: int) -> int:
        model_config = deep("llama", 4)
        model_config.vocab_size = vocabulary
        config = make_config(offload=offload, precision="bf16-true", gradient_accumulation_steps=4)
        return operators_of_a_plan(monkeypatch, config, model_config, Batch(1, 16, 16))

    rows = small_chunks // deep("llama", 4).hidden_size + 1
    assert operators(100 * rows) == operators(10 * rows)


# ---------------------------------------------------------------------------------------------- Mistral-7B


def test_the_lessons_numbers_of_mistral_7b() -> None:
    model_config = find_config(Config(model=MISTRAL))
    config = make_config(model=MISTRAL, activation_checkpointing="full")
    none = replace(config, master_weights="none")
    planned = plan_step(none, model_config, BATCH)
    gigabytes = {name: round(size / 1e9, 2) for name, size in planned["components"].items()}
    assert planned["num_parameters"] == 7_241_732_096
    assert (gigabytes["parameters"], gigabytes["gradients"], gigabytes["optimizer_states"]) == (14.48, 14.48, 28.97)
    # The lesson's 2 x 28.97 GB are moments in fp32.
    mixed = plan_step(replace(config, precision="bf16-mixed"), model_config, BATCH)["components"]
    assert (round(mixed["parameters"] / 1e9, 2), round(mixed["optimizer_states"] / 1e9, 2)) == (28.97, 57.93)
    # Split masters: 16 bits more per weight, and moments in fp32; sums of gradients too.
    split = plan_step(config, model_config, BATCH)["components"]
    found = [round(split[name] / 1e9, 2) for name in ("parameters", "gradients", "optimizer_states")]
    assert found == [14.48, 28.97, 72.42]
    single = plan_step(replace(config, gradient_accumulation_steps=1), model_config, BATCH)["components"]
    assert round(single["gradients"] / 1e9, 2) == 14.48


def test_lora_zero_and_time_follow_their_formulas() -> None:
    plans = Plans(find_config(Config(model=MISTRAL)))
    config = make_config(model=MISTRAL, precision="bf16-true", activation_checkpointing="full")
    facts, count = plans.facts(512), PUBLISHED[MISTRAL]
    assert facts.lora_parameters == 32 * 8 * (4096 + 4096 + 4096 + 1024)
    assert facts.layer_matrices == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    lora, qlora = estimate_adapters(config, plans, BATCH)
    assert lora["parameters"] == 2 * count + 4 * facts.lora_parameters
    assert lora["gradients"] + lora["optimizer_states"] == 12 * facts.lora_parameters
    assert 3.9e9 < qlora["parameters"] < 4.2e9
    planned = plans.of(config, BATCH)
    states = planned["at_peak"]["optimizer_states"]
    assert (
        estimate_zero(config, plans, BATCH, 1, 1) == estimate_zero(config, plans, BATCH, 3, 1) == planned["peak_bytes"]
    )
    assert planned["peak_bytes"] - estimate_zero(config, plans, BATCH, 1, 4) == states - states // 4
    work = estimate_work(config, facts, BATCH)
    assert (work.rows, work.tokens) == (2850, 2850 * 512)
    assert work.training_flops == work.tokens * facts.flops_per_token
    assert work.flops == pytest.approx(work.training_flops * 4 / 3)
    assert facts.flops_per_token == 6 * (count - 32000 * 4096) + 12 * 32 * 4096 * 512
    assert estimate_work(replace(config, max_steps=10), facts, BATCH).rows == 160


# ---------------------------------------------------------------------------------------------- levers


@pytest.mark.parametrize(
    "options", [{"per_device_train_batch_size": 4}, {"precision": "fp32", "activation_checkpointing": "every_2"}]
)
def test_levers_are_true(options: dict[str, object]) -> None:
    """Planning anew with a lever's own flags gives the bytes that it states."""
    config = make_config(activation_checkpointing="none") if "precision" not in options else make_config()
    config = replace(config, **options)
    model_config = deep("llama", 3)
    model_config.vocab_size, model_config.hidden_size = 64, 256  # large matrices, to be worth 8 bits
    plans, batch = Plans(model_config), Batch(config.per_device_train_batch_size, 256, 256)
    peak = plan_step(config, model_config, batch)["peak_bytes"]
    levers = find_levers(config, plans, batch, Device("mine", 2**40))
    assert len(levers) > 3 and levers[-1].flags == ALL
    times = [lever.time for lever in levers if lever.flags.endswith("selective")]
    assert times == (["about +10%"] if config.activation_checkpointing == "none" else [])
    every: list[str] = []
    for lever in levers:
        words = lever.flags.split() if lever.flags != ALL else every
        if lever.price.startswith("accumulate"):
            words = [*words, "--gradient_accumulation_steps", lever.price.split()[1]]
        every += words
        changes = {word[2:]: value for word, value in zip(words[::2], words[1::2], strict=True)}
        numbers = {name: int(value) if value.isdigit() else value for name, value in changes.items()}
        length = numbers.pop("max_length", batch.length)
        lowered = replace(config, **numbers)
        if "parameters" in lowered.offload:
            lowered = replace(lowered, activation_checkpointing="full")  # as follows from it, unless it is given
        anew = plan_step(lowered, model_config, Batch(lowered.per_device_train_batch_size, length, length))
        assert anew["peak_bytes"] == lever.peak_bytes == peak - lever.saved_bytes


# ---------------------------------------------------------------------------------------------- what fits


def test_verdicts_turn_at_the_byte() -> None:
    planned = plan_step(make_config(), deep("llama"), BATCH)
    peak = planned["peak_bytes"]
    for size, fits in ((peak, True), (peak - 1, False)):
        first, *others = report.plan_object(make_config(), planned, find_facts(deep("llama"), 8), Device("mine", size))[
            "verdicts"
        ]
        assert first == {"device": "mine", "memory_bytes": size, "fits": fits}
        assert [each["memory_bytes"] for each in others] == [each.memory_bytes for each in cards()]
    assert cards()[2].memory_bytes == 24 * 2**30 - CONTEXT_BYTES


def test_the_fastest_choice_that_fits_is_taken() -> None:
    """Of the resident ones; each is taken down to the byte below which it no longer fits."""
    plans, batch, config = Plans(deep("llama", 2)), Batch(4, 256, 256), make_config()
    assert (config.activation_checkpointing, config.offload) == ("auto", "auto")
    resident = choices(replace(config, offload="none"), plans, batch, Device("mine", 0), ASSUMED)
    assert [choice.activation_checkpointing for choice in resident] == ["none", "selective", "full"]
    peaks = [plans.of(choice.apply(config), batch)["peak_bytes"] for choice in resident]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3

    def not_asked() -> Speeds:
        raise AssertionError("nothing needs to be measured")

    for choice, peak in zip(resident, peaks, strict=True):
        chosen, line = choose(config, plans, batch, Device("mine", peak), not_asked)
        assert chosen == choice.apply(config)
        assert choice.describe() in line and "the fastest exact choice to fit mine" in line
        # One byte less, and it is no longer this one.
        assert choose(config, plans, batch, Device("mine", peak - 1), lambda: ASSUMED)[0] != chosen
    # In graphs what is cheap is recomputed in any case.
    compiled = replace(config, offload="none", compile="true")
    graphs = choices(compiled, plans, batch, Device("mine", 0), ASSUMED)
    assert [choice.activation_checkpointing for choice in graphs] == ["none", "every_2", "full"]
    assert [plans.of(choice.apply(compiled), batch)["peak_bytes"] for choice in (graphs[0], graphs[2])] == peaks[1:]
    asked = replace(config, activation_checkpointing="every_3", offload="none")
    assert choose(asked, plans, batch, Device("mine", 0), not_asked)[0] == asked
    off = make_config(fit="off")
    assert (off.activation_checkpointing, off.offload) == ("none", "none")


def test_below_the_resident_ones_something_leaves_the_device() -> None:
    plans, batch, config = Plans(deep("llama", 4)), Batch(1, 16), make_config()
    full = replace(config, activation_checkpointing="full", offload="none")
    below = plans.of(full, batch)["peak_bytes"] - 1
    chosen, line = choose(config, plans, batch, Device("mine", below), lambda: ASSUMED)
    planned = plans.of(chosen, batch)
    assert "=host" in chosen.offload and planned["peak_bytes"] <= below and "on the host" in line
    # No faster one by estimate fits.
    ranked = choices(config, plans, batch, Device("mine", below), ASSUMED)
    for choice in ranked[: [choice.apply(config) for choice in ranked].index(chosen)]:
        assert plans.of(choice.apply(config), batch)["peak_bytes"] > below
    # Without host memory the disk remains; without a disk, nothing.
    chosen, _ = choose(config, plans, batch, Device("mine", below, host_bytes=0), lambda: ASSUMED)
    assert "disk" in chosen.offload and "host" not in chosen.offload
    assert plans.of(chosen, batch)["peak_bytes"] <= below
    nowhere = Device("mine", below, host_bytes=0, disk_bytes=0)
    assert "nothing fits mine" in choose(config, plans, batch, nowhere, lambda: ASSUMED)[1]
    # What the user has set stays.
    asked = replace(config, offload="none")
    chosen, line = choose(asked, plans, batch, Device("mine", below), lambda: ASSUMED)
    assert chosen == full and "nothing fits mine" in line


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "offload", ["none", "optimizer=host", "gradients=host,optimizer=disk", "parameters=disk,gradients=disk"]
)
def test_what_rests_is_what_the_plan_counts(offload: str, accumulation: int) -> None:
    config = make_config(offload=offload, gradient_accumulation_steps=accumulation, activation_checkpointing="full")
    model_config = deep("llama", 4)
    model_config.vocab_size = model_config.hidden_size = 256  # matrices that are whole pages, and large
    plans, batch = Plans(model_config), Batch(1, 8)
    resting, planned = resting_bytes(config, plans.facts(8)), plans.of(config, batch)
    assert planned["peak_bytes"] >= resting["device"]
    components = planned["components"]
    if "parameters" not in offload:
        found = sum(components[name] for name in ("parameters", "gradients", "optimizer_states"))
        assert found == resting["device"]
    # On disk each tensor is rounded up to pages; layers that are streamed pass through memory on their way.
    assert resting["disk"] <= planned["disk_bytes"] <= 1.05 * resting["disk"]
    assert resting["host"] == planned["host_bytes"]


def test_a_run_that_cannot_fit_stops_before_its_weights_are_loaded() -> None:
    model_config, cpu = deep("llama", 2), torch.device("cpu")
    config, ids = make_config(precision="bf16-mixed", offload="none"), torch.ones(1, 32, dtype=torch.int64)
    train = Mock(steps_per_epoch=1, sequences_per_step=16, mean_length=32.0)
    data = Mock(train=train, largest=lambda accumulation: ([MicroBatch.of(ids)] * accumulation, None))
    with pytest.raises(MemoryExhaustedError) as refusal:
        plan_run(replace(config, device_memory="512.5MiB"), model_config, data, cpu)
    assert refusal.value.exit_code == 8
    for part in ("512.5MiB card has 0.50 MiB", "MiB at its peak", "--precision bf16-true", "--fit off"):
        assert part in str(refusal.value)
    plan = plan_run(replace(config, device_memory="1GiB"), model_config, data, cpu)
    assert plan.config.activation_checkpointing == "none"
    assert plan.figures == plan_step(plan.config, model_config, Batch(1, 32))
    off = make_config(precision="bf16-mixed", device_memory="512.5MiB", fit="off")
    assert plan_run(off, model_config, data, cpu).figures == plan.figures


def test_available_memory_is_less_than_there_is() -> None:
    assert 0 < available_host_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("24G", 24 * 2**30), ("1.5 gib", 3 * 2**29)]
)
def test_an_amount_of_memory_is_read_as(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "24XB", "0", "24b", "GiB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory"):
        parse_size(text)


def test_flags_that_need_a_plan_say_so(in_empty_folder: Path) -> None:
    with pytest.raises(OptionsError) as refusal:
        parse_config(["--json", "--gpus", "2", "--gpu_hour_price", "3", "--device_memory", "much"])
    for flag in ("--json", "--gpus", "--gpu_hour_price"):
        assert f"{flag} does nothing without --plan" in str(refusal.value)
    assert "device_memory: 'much' is no amount of memory" in str(refusal.value)
    Path("full-ft-demo").mkdir()
    Path("full-ft-demo", "notes.txt").touch()
    parse_config(["--plan", "--json", "--output_dir", "full-ft-demo"])  # a plan writes nothing there


# ---------------------------------------------------------------------------------------------- what is shown


def test_json_follows_the_contract(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep("llama", 14).save_pretrained("tiny")
    config = parse_config(["--model", "tiny", "--plan", "--json", "--device_memory", "24GiB", "--max_length", "32"])
    report.show_plan(config)
    shown = json.loads(capsys.readouterr().out)
    planned = plan_step(
        replace(config, activation_checkpointing="none", offload="none"), find_config(config), Batch(1, 32, 32)
    )
    assert {name: shown[name] for name in planned} == planned
    assert set(shown) == {*planned, "model", "options", "verdicts"}
    assert set(shown["at_peak"]) == set(shown["components"]) == set(COMPONENTS)
    assert sum(shown["at_peak"].values()) == shown["peak_bytes"]
    assert shown["options"]["activation_checkpointing"] == "none"
    assert shown["model"] == "tiny" and len(shown["verdicts"]) == 8
    assert shown["verdicts"][0] == {"device": "24GiB card", "memory_bytes": 47 * 2**29, "fits": True}


def test_what_gpus_and_their_price_ask_for_reaches_the_json(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep("llama").save_pretrained("tiny")
    words = ["--model", "tiny", "--plan", "--json", "--max_length", "32", "--gpus", "3", "--gpu_hour_price", "2"]
    report.show_plan(parse_config(words))
    shown = json.loads(capsys.readouterr().out)
    zero, at_peak = shown["zero_bytes_per_gpu"], shown["at_peak"]
    assert zero["gpus"] == 3 and zero["stage_1"] > zero["stage_2"] > zero["stage_3"]
    states = at_peak["optimizer_states"]
    assert zero["stage_1"] == shown["peak_bytes"] - states + states // 3
    assert shown["cost"] == {name: 2 * hours for name, hours in shown["gpu_hours"].items()}
    assert set(shown["cost"]) == {"A100", "H100"}
    report.show_plan(parse_config([*words, "--precision", "fp32"]))
    shown = json.loads(capsys.readouterr().out)
    assert shown["gpu_hours"] is shown["cost"] is None


def test_whether_it_compiles_is_planned(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("fullft.compilation._lack", lambda device: "")
    words = ["--plan", "--packing", "--activation_checkpointing", "full"]
    config = parse_config(words)
    work = estimate_work(config, Plans(find_config(config)).facts(config.max_length), Batch(1, config.max_length, 0))

    def shown(*more: str) -> str:
        report.show_plan(parse_config([*words, *more]))
        return capsys.readouterr().out

    # Recomputing, a third more, is no reason.
    monkeypatch.setitem(WORTH_IT, "cpu", 1.01 * work.training_flops)
    assert json.loads(shown("--json"))["options"]["compile"] == "false" and "Compile" not in shown()
    monkeypatch.setitem(WORTH_IT, "cpu", 0.99 * work.training_flops)
    assert json.loads(shown("--json"))["options"]["compile"] == "true"
    assert "Compile: the decoder layers" in shown() and "Compile" not in shown("--device_memory", "24GiB")
    monkeypatch.setattr("fullft.compilation._lack", lambda device: "a compiler")
    with pytest.raises(OptionsError, match="needs a compiler"):
        shown("--compile", "true")


def test_a_small_model_is_shown_in_a_small_unit(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.show_plan(parse_config(["--plan"]))
    shown = capsys.readouterr().out
    assert "MiB = 2^20 bytes, MB = 10^6" in " ".join(shown.split()) and "GiB" not in shown
    (parameters,) = [line for line in shown.splitlines() if line.startswith("parameters")]
    assert "3.02 MiB" in parameters


def test_amounts_are_written_in_one_unit() -> None:
    assert unit_for(2**30) is GIB and unit_for(2**30 - 1) is MIB
    sizes = (0, 2**30, 150 * 2**30, -(2**41))
    assert [GIB.amount(size) for size in sizes] == ["0.00 GiB", "1.00 GiB", "150.0 GiB", "-2,048 GiB"]


def test_hours_say_what_is_in_them(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode, told in (("none", "of peak: A100"), ("full", "of peak, with recomputation: A100")):
        words = ["--model", "gpt2", "--device_memory", "24GiB", "--activation_checkpointing", mode, "--plan"]
        report.show_plan(parse_config(words))
        assert told in capsys.readouterr().out


def test_the_screen_fits_the_screen(in_empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """45 lines of 100 columns, for a model that fits nowhere and for one that has every lever."""
    for words in (
        ["--model", MISTRAL, "--device_memory", "24GiB", "--gpu_hour_price", "2.5"],
        ["--model", "gpt2", "--per_device_train_batch_size", "4", "--device_memory", "24GiB", "--gpus", "16"],
    ):
        report.show_plan(parse_config([*words, "--plan"]))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 45 and max(map(len, lines)) <= 100, max(lines, key=len)
        text = "\n".join(lines)
        assert ("of peak, offloading aside: A100" in text) == (MISTRAL in words)
        for part in ("GiB = 2^30", "LoRA", "stage 3", "24GiB card", "141 GB card", "A100", *words[1:2]):
            assert part in text


def test_planned_and_measured_side_by_side() -> None:
    planned = plan_step(make_config(), deep("llama"), BATCH)
    measured = planned | {"at_peak": planned["at_peak"] | {"logits": 2 * planned["at_peak"]["logits"]}}
    lines = {line[:18].strip(): line.split()[-1] for line in report.compare(planned, measured).splitlines()}
    assert lines["logits"] == "+100.00%" and lines["parameters"] == lines["all"] == "+0.00%"


# ---------------------------------------------------------------------------------------------- bad input

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": -5}, "vocab_size is -5, not a whole number above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"intermediate_size": True}, "intermediate_size is True"),
        ({"hidden_size": 33}, "the width 33 is not divisible by 4 attention heads"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"num_hidden_layers": 10**9, "hidden_size": 8192}, "parameters, more than any model has"),
        ({"text_config": {"vocab_size": 0}}, "vocab_size is 0"),
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal language model"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "not a causal language model"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(ModelError) as refusal:
        find_config(Config(model=str(tmp_path)))
    assert message in str(refusal.value) and refusal.value.exit_code == 4
    assert len(str(refusal.value).splitlines()) <= 2


def test_a_model_that_is_nowhere(in_empty_folder: Path) -> None:
    Path("empty").mkdir()
    for name, message in (
        ("empty", "has no config.json"),
        ("./nothing", "there is no model folder"),
        ("nobody/nothing", "found neither as a folder"),
    ):
        with pytest.raises(ModelError, match=message):
            find_config(Config(model=name))


def test_sequences_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(OptionsError, match="pass --max_length 1024"):
        report.largest_batch(make_config(max_length=2048), Plans(find_config(Config(model="gpt2"))))


def test_kinds_of_layers_repeat() -> None:
    assert layer_period(deep("llama")) == 1 and layer_period(deep("gemma2", 8)) == 2
    assert layer_period(AutoConfig.for_model("gpt2")) == 1


# ---------------------------------------------------------------------------------------------- weights on the hub


@pytest.fixture
def cached_model() -> Iterator[Path]:
    """The snapshot of `somebody/tiny` in the hub's cache, with its config alone."""
    snapshot = Path(HF_HUB_CACHE) / "models--somebody--tiny" / "snapshots" / "0123456789"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    yield snapshot
    shutil.rmtree(snapshot.parent.parent)


def test_weights_that_the_hubs_cache_lacks_are_missed_at_once(cached_model: Path) -> None:
    config = Config(model="somebody/tiny")
    assert find_config(config).vocab_size == 100
    with pytest.raises(ModelError, match="somebody/tiny in the hub's cache.* has no weights"):
        find_model(config)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (cached_model / "model.safetensors.index.json").write_text(json.dumps(index))
    (cached_model / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ModelError, match="lacks 1 of 2 weights files, such as model-00002-of-00002"):
        find_model(config)
    (cached_model / "model-00002-of-00002.safetensors").touch()
    assert find_model(config) == "somebody/tiny"
    for name in ("nobody/nothing", MISTRAL):  # a bundled config is not a model
        with pytest.raises(ModelError, match="found neither as a folder"):
            find_model(Config(model=name))


def test_weights_that_the_hub_has_need_not_be_in_its_cache(cached_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_module, "is_offline_mode", lambda: False)
    for there in ("model.safetensors", "pytorch_model.bin.index.json", "nothing"):
        monkeypatch.setattr(find_module, "has_file", lambda name, file, there=there: file == there)
        if there != "nothing":
            assert find_model(Config(model="somebody/tiny")) == "somebody/tiny"
    with pytest.raises(ModelError, match="somebody/tiny has no weights .* on the hub"):
        find_model(Config(model="somebody/tiny"))


def test_missing_weights_are_reported_before_a_plan_that_does_not_fit(
    cached_model: Path, in_empty_folder: Path
) -> None:
    words = ["--model", "somebody/tiny", "--dataset", str(DEMO_FOLDER / "instructions.jsonl")]
    with pytest.raises(ModelError, match="has no weights"):
        main(parse_config([*words, "--device_memory", "512.5MiB"]))
