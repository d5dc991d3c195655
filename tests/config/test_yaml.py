"""YAML files of options: what a value means, what is said about a wrong one, what a flag beats."""

import dataclasses
from pathlib import Path

import pytest
from command_lines import problems_of, write_yaml

from fullft.config.config import to_yaml
from fullft.config.declare import by_name, kind_of
from fullft.config.options import Options
from fullft.config.parse import parse_config, read_flags, read_yaml

# ---------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: off", "eval_strategy", "no"),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # text to YAML
        ("learning-rate: 0.5", "learning_rate", 0.5),
        ("learning_rate: ~", "learning_rate", 3e-3),  # the demo's
        ("max_steps: '7'", "max_steps", 7),
        ("packing: yes", "packing", True),
        ("gradient_checkpointing: true", "activation_checkpointing", "full"),
        ("gradient_checkpointing: false", "activation_checkpointing", "none"),
        ("model_name_or_path: a/b", "model", "a/b"),
        ("model: 7", "model", "7"),
        ("report_to: [tensorboard]", "report_to", "tensorboard"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "newest"),
        ("columns: {output: answer}", "columns", {"output": "answer"}),
        ("columns: [output=answer]", "columns", {"output": "answer"}),
        ("columns: output=answer", "columns", {"output": "answer"}),
        ("offload: [optimizer=host, gradients=disk]", "offload", "optimizer=host,gradients=disk"),
        ("offload: {optimizer: host}", "offload", "optimizer=host"),
        ("# nothing but a comment", "optim", "adamw"),
        ("\ufeffseed: 3", "seed", 3),
        # Words that YAML 1.1 reads as something else.
        ("fit: off", "fit", "off"),
        ("fit: no", "fit", "off"),
        ("compile: off", "compile", "false"),
        ("compile: on", "compile", "true"),
        ("compile: 1", "compile", "true"),
        ("save_strategy: off", "save_strategy", "no"),
        ("eval_strategy: false", "eval_strategy", "no"),
        ("gradient_checkpointing: off", "activation_checkpointing", "none"),
        ("offload: no", "offload", "none"),
        ("report_to: off", "report_to", "none"),
        ("master_weights: none", "master_weights", "none"),
        ("resume_from_checkpoint: yes", "resume_from_checkpoint", "newest"),
        ("resume_from_checkpoint: off", "resume_from_checkpoint", None),
        ("dataset_text_field: yes", "dataset_text_field", "yes"),
        ("columns: {output: on, prompt: 1.10}", "columns", {"output": "on", "prompt": "1.10"}),
        ("model: 1.10", "model", "1.10"),
        ("model: 007", "model", "007"),
        ("output_dir: 2024-1-1", "output_dir", Path("2024-1-1")),
        ("output_dir: 12:30", "output_dir", Path("12:30")),
        ("output_dir: no", "output_dir", Path("no")),
        ("model: 'null'", "model", "null"),
        ("seed: null", "seed", 42),
        ("max_steps: 010", "max_steps", 10),
        ("max_steps: 1_000", "max_steps", 1000),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("packing: off", "packing", False),
    ],
)
def test_a_yaml_line_is_read_as_its_value(text: str, name: str, value: object) -> None:
    assert getattr(parse_config(["--config", write_yaml(text)]), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1", "run.yaml: unknown option learnig_rate; did you mean learning_rate?"),
        ("bf16: true", "run.yaml: unknown option bf16; did you mean precision?"),
        ("1: 2", "run.yaml: unknown option 1; --help lists them all"),
        ("model: [a]", "run.yaml: model: takes one value, not a list"),
        ("optim: {name: adamw}", "run.yaml: optim: takes one value, not a mapping"),
        ("seed: true", "run.yaml: seed: 'true' is not a whole number"),
        ("seed: .nan", "run.yaml: seed: '.nan' is not a whole number"),
        ("seed: 10:00", "run.yaml: seed: '10:00' is not a whole number"),
        ("learning_rate: yes", "run.yaml: learning_rate: 'yes' is not a number"),
        ("save_strategy: yes", "run.yaml: save_strategy: 'yes' is not one of no, epoch, steps"),
        ("fit: on", "run.yaml: fit: 'on' is not one of auto, off"),
        ("columns: {output: a, output: b}", "run.yaml: columns: output stands there twice: keep one of the two"),
        ("packing: 3", "run.yaml: packing: '3' is neither true nor false"),
        ("columns: {output: ~}", "run.yaml: columns: 'output' needs a value"),
        ("columns: 3", "run.yaml: columns: '3' is not one of instruction, input"),
        ("seed: 1\nseed: 2", "run.yaml: seed sets seed a second time"),
        ("model: a\nmodel_name_or_path: b", "run.yaml: model_name_or_path sets model a second time, after model"),
        ("- a\n- b", "--config run.yaml must hold `option: value` lines"),
        ("hello", "--config run.yaml must hold `option: value` lines"),
        ("a: [1\nb: 2", "--config run.yaml, line 2: not YAML: expected ',' or ']'"),
        ("model: !!python/object:os.system {}", "--config run.yaml, line 1: not YAML: could not determine"),
        ("model: caf\xe9".encode("latin-1"), "--config run.yaml is not UTF-8 text (byte 10)"),
    ],
)
def test_a_wrong_yaml_file_is_refused_with_cause(text: str | bytes, message: str) -> None:
    (line,) = problems_of("--config", write_yaml(text))
    assert message in line


def test_a_config_that_is_no_file_is_refused() -> None:
    Path("folder").mkdir()
    assert problems_of("--config", "nope.yaml") == ["--config nope.yaml: No such file or directory"]
    assert problems_of("--config", "folder") == ["--config folder: Is a directory"]


def test_a_flag_beats_the_file() -> None:
    file = write_yaml("model: a/b\nlearning_rate: 1.0\nseed: 1\npacking: true\ncolumns: {output: answer}\n")
    config = parse_config(["--config", file, "--learning_rate", "2", "--packing", "false", "--columns", "prompt=q"])
    assert (config.model, config.seed) == ("a/b", 1)
    assert (config.learning_rate, config.packing, config.columns) == (2.0, False, {"prompt": "q"})
    # With a model in the file, the demo's defaults are out.
    assert config.precision == Options().precision != parse_config([]).precision


def test_a_word_means_the_same_in_file_and_flag() -> None:
    """Every choice of every option, and every way to write yes and no."""
    ways = ("true", "yes", "on", "false", "no", "off", "True", "No", "OFF")
    tried = 0
    for name, option in by_name(Options).items():
        choices = [str(choice).replace("<n>", "3") for choice in option.metadata["choices"]]
        if kind_of(option) is dict:
            continue
        for word in (*choices, *ways):
            outcomes = []
            for read in (["--config", write_yaml(f"{name}: {word}")], [f"--{name}={word}"]):
                problems: list[str] = []
                flags = read_flags(Options, read, problems)
                values = read_yaml(Options, flags["config"], problems) if "config" in flags else flags
                outcomes.append((values, [problem.split(": ", 1 + ("config" in flags))[-1] for problem in problems]))
            assert outcomes[0] == outcomes[1], (name, word)
            assert word not in choices or outcomes[0][0] == {name: word}, (name, word)
            tried += 1
    assert tried > 300


def test_a_conflict_within_the_file_is_refused() -> None:
    file = write_yaml("model: a\ngradient_accumulation_steps: 3\nglobal_batch_size: 16\n")
    assert "global_batch_size 16 is not a multiple of gradient_accumulation_steps 3" in problems_of("--config", file)[0]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--output_dir out --max_steps 3",
        "--model a/b",
        "--model 7 --dataset x.jsonl --columns output=answer --packing --precision bf16-true",
        "--learning_rate 1e-5 --adam_epsilon 1e-12 --warmup_steps 3 --val_size 0",
        "--eval_strategy no --save_strategy no --report_to tensorboard --save_total_limit 1",
        "--gradient_checkpointing --resume_from_checkpoint --global_batch_size 8 --dataset_split test[:10%]",
    ],
)
def test_the_written_config_reads_back_identically(words: str) -> None:
    config = parse_config(words.split())
    # What was asked of one run only is not in it.
    lasting = dataclasses.replace(config, overwrite_output_dir=False, resume_from_checkpoint=None)
    assert parse_config(["--config", write_yaml(to_yaml(config), "config.yaml")]) == lasting


def test_the_written_config_drops_one_shot_options() -> None:
    config = parse_config(["--overwrite_output_dir", "--resume_from_checkpoint", "--allow_changes", "--debug"])
    Path("config.yaml").write_text(to_yaml(config))
    again = parse_config(["--config", "config.yaml"])
    assert not again.allow_changes and not again.debug and not again.overwrite_output_dir
    assert again.resume_from_checkpoint is None and again.learning_rate == config.learning_rate
