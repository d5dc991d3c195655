"""Command lines: what words mean, and what is said about wrong ones."""

import sys
from pathlib import Path

import pytest
from command_lines import problems_of, write_yaml

from fullft.config.declare import by_name
from fullft.config.options import Options
from fullft.config.parse import parse_config

# ---------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--learning-rate 1e-4", "learning_rate", 1e-4),
        ("--learning_rate=1e-4", "learning_rate", 1e-4),
        ("--per-device_train-batch-size=2", "per_device_train_batch_size", 2),
        ("--max_steps 1e2", "max_steps", 100),
        ("--max_steps -1", "max_steps", -1),
        ("--seed 4294967295", "seed", 2**32 - 1),
        ("--packing", "packing", True),
        ("--packing true", "packing", True),
        ("--packing=TRUE", "packing", True),
        ("--packing --max_length 99", "packing", True),
        ("--packing false", "packing", False),
        ("--packing --packing no", "packing", False),
        ("--model_name_or_path a/b", "model", "a/b"),
        ("--dataset_name a/b", "dataset", "a/b"),
        ("--dataset a=b", "dataset", "a=b"),
        ("--gradient_checkpointing", "activation_checkpointing", "full"),
        ("--gradient_checkpointing true", "activation_checkpointing", "full"),
        ("--gradient_checkpointing False", "activation_checkpointing", "none"),
        ("--activation_checkpointing", "activation_checkpointing", "full"),
        ("--activation_checkpointing every_12", "activation_checkpointing", "every_12"),
        ("--activation-checkpointing every-2", "activation_checkpointing", "every_2"),
        ("--optim adamw_torch", "optim", "adamw"),
        ("--optim adamw_torch_fused", "optim", "adamw"),
        ("--optim adamw_bnb_8bit", "optim", "adamw_8bit"),
        ("--precision BF16-true", "precision", "bf16-true"),
        ("--precision bf16_mixed", "precision", "bf16-mixed"),
        ("--precision bf16", "precision", "bf16-mixed"),
        ("--resume_from_checkpoint", "resume_from_checkpoint", "newest"),
        ("--resume_from_checkpoint True", "resume_from_checkpoint", "newest"),
        ("--resume_from_checkpoint false", "resume_from_checkpoint", None),
        ("--columns output=answer prompt=q", "columns", {"output": "answer", "prompt": "q"}),
        ("--columns output=answer --columns prompt=a=b", "columns", {"output": "answer", "prompt": "a=b"}),
        ("--report_to tensorboard", "report_to", "tensorboard"),
        ("--warmup_steps 0.1", "warmup_steps", 0.1),
        ("--offload none", "offload", "none"),
        ("--offload optimizer=host gradients=disk", "offload", "optimizer=host,gradients=disk"),
        ("--offload optimizer=host,gradients=disk", "offload", "optimizer=host,gradients=disk"),
        ("--offload cpu", "offload", "optimizer=host"),
        ("--offload parameters=host", "activation_checkpointing", "full"),
        ("--fit off", "offload", "none"),
        ("--master_weights Stochastic", "master_weights", "stochastic"),
        ("--eval_strategy no", "eval_strategy", "no"),
    ],
)
def test_a_flag_is_read_as_its_value(words: str, name: str, value: object) -> None:
    read = getattr(parse_config(words.split()), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # unknown names: the near one, what other programs call it, abbreviations
        ("--learnig_rate 1e-4", "unknown option --learnig_rate; did you mean --learning_rate?"),
        ("--LEARNING_RATE 1", "unknown option --LEARNING_RATE; did you mean --learning_rate?"),
        ("--learn 1e-4", "unknown option --learn; did you mean --learning_rate?"),
        ("--pack", "unknown option --pack; did you mean --packing?"),
        ("-model x", "unknown option -model; did you mean --model?"),
        ("--lr 1e-4", "unknown option --lr; did you mean --learning_rate?"),
        ("--batch_size 4", "unknown option --batch_size; did you mean --per_device_train_batch_size?"),
        ("--epochs=3", "unknown option --epochs; did you mean --num_train_epochs?"),
        ("--fp16", "unknown option --fp16; did you mean --precision?"),
        ("--warmup_ratio 0.1", "unknown option --warmup_ratio; did you mean --warmup_steps?"),
        ("--no-packing", "unknown option --no_packing; did you mean --packing false?"),
        ("--cofig run.yaml", "unknown option --cofig; did you mean --config?"),
        ("--zzz 1", "unknown option --zzz; --help lists them all"),
        ("foo", "unexpected argument 'foo': options are written --name value"),
        ("--max_length 5 6", "unexpected argument '6': options are written --name value"),
        ("--help=5", "argument -h/--help: ignored explicit argument '5'"),
        # values
        ("--learning_rate", "--learning_rate: needs a value"),
        ("--learning_rate=", "--learning_rate: needs a value"),
        ("--model --packing", "--model: needs a value"),
        ("--columns", "--columns: needs a value"),
        ("--config", "--config needs a YAML file"),
        ("--learning_rate -1e-5", "--learning_rate: -1e-5 must be at least 0"),
        ("--learning_rate=-1e-5", "--learning_rate: -1e-5 must be at least 0"),
        ("--learning_rate -.5", "--learning_rate: -.5 must be at least 0"),
        ("--learning_rate -inf", "--learning_rate: '-inf' is not a number"),
        ("--learning_rate nan", "--learning_rate: 'nan' is not a number"),
        ("--max_length 512tokens", "--max_length: '512tokens' is not a whole number (tokens)"),
        ("--max_length 0.5", "--max_length: '0.5' is not a whole number (tokens)"),
        ("--seed 4294967296", "--seed: 4294967296 must be below 4,294,967,296"),
        ("--val_size 20", "--val_size: 20 must be below 1 (fraction of rows)"),
        ("--adam_epsilon 0", "--adam_epsilon: 0 must be above 0"),
        ("--packing maybe", "--packing: 'maybe' is neither true nor false"),
        ("--precision fp16", "--precision: 'fp16' is not one of fp32, bf16-mixed, bf16-true"),
        ("--activation_checkpointing every_0", "'every_0' is not one of none, selective, full, every_<n>"),
        ("--master_weights fp32", "--master_weights: 'fp32' is not one of split, stochastic, none"),
        ("--offload optimizer=tape", "'optimizer=tape' is neither none nor one of parameters=device|host|disk"),
        ("--offload gradients", "'gradients' is neither none nor one of"),
        ("--cpu_offload", "unknown option --cpu_offload; did you mean --offload?"),
        ("--columns answer=output", "'answer' is not one of instruction, input, output"),
        ("--columns output", "--columns: 'output' needs a value: output=yours"),
        ("--columns output=a output=b", "--columns: 'output' stands in two pairs"),
        ("--columns output=a prompt=a", "--columns: 'a' stands in two pairs"),
        # combinations
        ("--max_steps 0", "max_steps 0 trains nothing"),
        ("--warmup_steps 2.5", "warmup_steps 2.5 is neither whole nor below 1"),
        ("--global_batch_size 6", "global_batch_size 6 is not a multiple of per_device_train_batch_size 8"),
        (
            "--global_batch_size 8 --per_device_train_batch_size 2 --gradient_accumulation_steps 3",
            "global_batch_size 8 is not 2 x 3: leave out gradient_accumulation_steps, or correct one of the two",
        ),
        ("--model x --eval_steps 5", "--eval_steps does nothing with eval_strategy epoch"),
        ("--model x --save_steps 5", "--save_steps does nothing with save_strategy epoch"),
    ],
)
def test_a_wrong_flag_is_refused_with_cause(words: str, message: str) -> None:
    (line,) = problems_of(*words.split())
    assert message in line


def test_all_problems_come_in_one_message() -> None:
    file = write_yaml("optim: sgd\nmax_lenght: 5\n")
    lines = problems_of("--config", file, "--learnig_rate", "1", "--save_steps", "0", "--max_steps", "0", "stray")
    assert len(lines) == 6
    for part in ("learnig_rate", "stray", "save_steps", "optim: 'sgd'", "max_lenght", "max_steps 0"):
        assert sum(part in line for line in lines) == 1, part


def test_an_empty_value_is_never_the_current_folder() -> None:
    for flag in ("--model", "--output_dir", "--dataset", "--resume_from_checkpoint"):
        assert problems_of(flag, "") == [f"{flag}: needs a value"]


# ---------------------------------------------------------------------------------------------- paths


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


PATHS = [
    "model",
    "model_name_or_path",
    "dataset",
    "dataset_name",
    "eval_dataset",
    "output_dir",
    "resume_from_checkpoint",
]


@pytest.mark.parametrize("option", PATHS)
def test_a_tilde_is_the_home_folder(option: str, home: Path) -> None:
    name = {"model_name_or_path": "model", "dataset_name": "dataset"}.get(option, option)
    for words in (
        [f"--{option}=~/x"],
        [f"--{option}", "~/x"],
        ["--config", write_yaml(f"{option}: ~/x")],
        ["--config", write_yaml(f"{option}: '~/x'")],
    ):
        assert str(getattr(parse_config(words), name)) == str(home / "x"), words
    # Elsewhere in a path it is a character like any other.
    assert str(getattr(parse_config([f"--{option}=a/~/x"]), name)) == "a/~/x"


@pytest.mark.parametrize("words", [["--config=~/run.yaml"], ["--config", "~/run.yaml"]])
def test_a_tilde_leads_to_the_config(words: list[str], home: Path) -> None:
    (home / "run.yaml").write_text("seed: 77")
    assert parse_config(words).seed == 77


def test_every_option_that_may_be_a_path_is_tried() -> None:
    names = {name for name, option in by_name(Options).items() if option.metadata["is_path"]}
    assert names == set(PATHS) & set(by_name(Options))
    shown = {option.metadata["metavar"] for name, option in by_name(Options).items() if name not in names}
    assert not any(word in metavar for metavar in shown for word in ("PATH", "FOLDER", "FILE"))


def test_a_home_that_nobody_has_is_refused() -> None:
    (line,) = problems_of("--output_dir", "~nobody_has_this_name/x")
    assert line == (
        "--output_dir: ~nobody_has_this_name is no user's home folder; if it is a name, write ./~nobody_has_this_name/x"
    )
    assert str(parse_config(["--output_dir", "./~x"]).output_dir) == "~x"


# ---------------------------------------------------------------------------------------------- help


def test_argv_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "5"])
    assert parse_config().seed == 5
