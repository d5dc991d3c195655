"""Resolved options: defaults, what follows from others, the typed objects."""

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest
from command_lines import MODEL, write_yaml
from models import make_config

from fullft.config.config import Config, resolve
from fullft.config.declare import by_name
from fullft.config.options import DEMO_FOLDER, Options
from fullft.config.parse import parse_config
from fullft.config.placement import Placement
from fullft.config.recomputation import Recomputation

# ---------------------------------------------------------------------------------------------- defaults


def test_defaults_with_a_model_are_the_documented_ones() -> None:
    config = parse_config(MODEL)
    documented = {
        "dataset": "tatsu-lab/alpaca",
        "dataset_split": "train[:1000]",
        "dataset_text_field": "text",
        "columns": {},
        "max_length": 512,
        "packing": False,
        "train_on_prompt": False,
        "val_size": 0.05,
        "output_dir": Path("full-ft-Mistral-7B-v0.1"),
        "overwrite_output_dir": False,
        "num_train_epochs": 3,
        "max_steps": -1,
        "seed": 42,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "global_batch_size": 16,
        "resume_from_checkpoint": None,
        "allow_changes": False,
        "optim": "adamw",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0,
        "max_grad_norm": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "precision": "bf16-true",
        "master_weights": "split",
        "activation_checkpointing": "auto",
        "offload": "auto",
        "fit": "auto",
        "trust_remote_code": False,
        "logging_steps": 10,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_steps": 500,
        "save_total_limit": None,
        "report_to": "none",
        "debug": False,
    }
    assert {name: getattr(config, name) for name in documented} == documented


def test_flags_beat_the_defaults_of_the_demo() -> None:
    demo = parse_config([])
    assert (demo.model, demo.output_dir, demo.precision) == (None, Path("full-ft-demo"), "fp32")
    assert demo.dataset == str(DEMO_FOLDER / "instructions.jsonl") and demo.dataset_split == "train"
    assert parse_config(["--precision", "bf16-mixed"]).precision == "bf16-mixed"
    assert parse_config(["--dataset", str(DEMO_FOLDER / "essay.txt")]).max_length == demo.max_length
    # The defaults of the demo are not those of a model.
    assert parse_config(MODEL).learning_rate != demo.learning_rate


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("mistralai/Mistral-7B-v0.1", "full-ft-Mistral-7B-v0.1"),
        ("gpt2", "full-ft-gpt2"),
        ("./models/mine", "full-ft-mine"),
        ("models/mine/", "full-ft-mine"),
        ("/models/mine", "full-ft-mine"),
        ("models/mine/.", "full-ft-mine"),
    ],
)
def test_output_dir_is_named_after_the_model(model: str, folder: str) -> None:
    assert parse_config(["--model", model]).output_dir == Path(folder)


def test_an_own_dataset_is_read_whole() -> None:
    assert parse_config([*MODEL, "--dataset", "rows.jsonl"]).dataset_split == "train"
    assert parse_config([*MODEL, "--dataset_split", "test"]).dataset_split == "test"


@pytest.mark.parametrize(
    ("file", "flags", "batch"),
    [
        ("", "--per_device_train_batch_size 2", (2, 8, 16)),
        ("", "--per_device_train_batch_size 3", (3, 6, 18)),  # 16 is no multiple
        ("", "--per_device_train_batch_size 32", (32, 1, 32)),
        ("", "--per_device_train_batch_size 2 --gradient_accumulation_steps 3", (2, 3, 6)),
        ("", "--gradient_accumulation_steps 4", (4, 4, 16)),
        ("", "--gradient_accumulation_steps 4 --global_batch_size 64", (16, 4, 64)),
        ("", "--per_device_train_batch_size 2 --global_batch_size 16", (2, 8, 16)),
        ("global_batch_size: 16", "--gradient_accumulation_steps 8", (2, 8, 16)),
        ("gradient_accumulation_steps: 4", "--global_batch_size 6", (1, 6, 6)),
        # a run's own config.yaml holds all three
        ("{per_device_train_batch_size: 2, gradient_accumulation_steps: 8, global_batch_size: 16}", "", (2, 8, 16)),
        (
            "{per_device_train_batch_size: 2, gradient_accumulation_steps: 8, global_batch_size: 16}",
            "--per_device_train_batch_size 4",
            (4, 4, 16),
        ),
    ],
)
def test_batch_accumulation_and_global_batch_agree(file: str, flags: str, batch: tuple[int, int, int]) -> None:
    config = parse_config([*MODEL, "--config", write_yaml(file), *flags.split()])
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.global_batch_size) == batch


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config([]).seed = 1  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------- typed


@pytest.mark.parametrize("words", ["", "--model a/b", "--model a/b --global_batch_size 6 --logging_steps 3"])
def test_resolved_options_leave_nothing_narrowed_at_none(words: str) -> None:
    config = parse_config(words.split())
    narrowed = get_type_hints(Config, localns={"Path": Path})
    names = Config.__annotations__.keys() & by_name(Options).keys()
    for name, kind in {name: narrowed[name] for name in names}.items():
        assert isinstance(getattr(config, name), kind), name
    assert config.global_batch_size == config.per_device_train_batch_size * config.gradient_accumulation_steps
    # In the options themselves they may be None, as long as nothing is resolved.
    assert names and all(getattr(Options(), name) is None for name in names)


def test_resolving_keeps_every_given_value() -> None:
    options = Options(dataset="d.jsonl", dataset_split="s", output_dir=Path("out"), eval_steps=7, val_size=0.1, seed=3)
    config = resolve(options)
    changed = {"per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "gpus"}
    for name in by_name(Options).keys() - changed:
        assert getattr(config, name) == getattr(options, name), name


@pytest.mark.parametrize(
    ("words", "undecided"),
    [
        ("--model m", {"activation_checkpointing", "offload", "compile", "micro_batch_tokens"}),
        ("--model m --micro_batch_tokens 512", {"activation_checkpointing", "offload", "compile"}),
        ("--model m --gradient_accumulation_steps 4", {"activation_checkpointing", "offload", "compile"}),
        ("", {"activation_checkpointing", "offload", "compile"}),  # the demo says how many rows
        ("--compile false", {"activation_checkpointing", "offload"}),
        ("--offload parameters=host", {"compile"}),  # streamed layers must be recomputed
        ("--activation_checkpointing full --offload none --compile true", set()),
        ("--fit off", set()),
    ],
)
def test_undecided_options_are_those_left_at_auto(words: str, undecided: set[str]) -> None:
    config = parse_config(words.split())
    assert config.undecided == undecided
    # Until the plan decides, auto means nothing.
    nothing = (Recomputation(), Placement(), False)
    values = zip(("activation_checkpointing", "offload", "compile"), nothing, strict=True)
    found = {
        "activation_checkpointing": config.recomputation,
        "offload": config.placement,
        "compile": config.compiles,
    }
    assert all(found[name] == value for name, value in values if name in undecided)
    assert config.must_fit == ("--fit" not in words)


def test_words_of_options_become_objects() -> None:
    config = make_config(
        offload="optimizer=disk,gradients=host",
        activation_checkpointing="every_3",
        compile="true",
        report_to="tensorboard,wandb",
        device_memory="24GB",
        optim="adamw_8bit",
    )
    assert config.placement == Placement(optimizer="disk", gradients="host")
    assert config.recomputation == Recomputation(every=3)
    assert config.compiles and config.accumulates and config.has_8bit_moments
    assert config.trackers == ["tensorboard", "wandb"]
    assert config.device_memory_bytes == 24 * 10**9
    plain = make_config(gradient_accumulation_steps=1)
    assert not (plain.compiles or plain.accumulates or plain.has_8bit_moments or plain.trackers)
    assert plain.device_memory_bytes is None


def test_paged_moments_are_paged_wherever_gradients_live() -> None:
    config = make_config(optim="paged_adamw_8bit", offload="gradients=host")
    assert config.placement == Placement(optimizer="paged", gradients="host")
    assert config.placement.offloaded == {"gradients": "host"}  # paged counts as on the device


def test_changed_options_are_parsed_anew() -> None:
    config = make_config(offload="none")
    assert config.placement == Placement()
    assert dataclasses.replace(config, offload="optimizer=host").placement == Placement(optimizer="host")
