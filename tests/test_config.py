"""Options: what a word, a YAML value and their combinations mean, and what is said about wrong ones."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from fullft.config import DEMO_FOLDER, Config, parse_config, to_yaml
from fullft.errors import OptionsError
from fullft.options import build_parser, by_name, options_table

MODEL = ["--model", "mistralai/Mistral-7B-v0.1"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts in an empty folder: what lies in the current one counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def problems_of(*words: str) -> list[str]:
    """Give the lines that a wrong command line is answered with."""
    with pytest.raises(OptionsError) as refusal:
        parse_config(words)
    assert refusal.value.exit_code == 2
    return [line.strip() for line in str(refusal.value).splitlines()]


def write_yaml(text: str | bytes, name: str = "run.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


# ---------------------------------------------------------------------------------------------- defaults


def test_defaults_beside_a_model_are_the_documented_ones() -> None:
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
        "output_dir": "./full-ft-Mistral-7B-v0.1",
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


def test_the_demo_has_defaults_of_its_own_and_flags_beat_them() -> None:
    demo = parse_config([])
    assert (demo.model, demo.output_dir, demo.precision) == (None, "./full-ft-demo", "fp32")
    assert demo.dataset == str(DEMO_FOLDER / "instructions.jsonl") and demo.dataset_split == "train"
    assert parse_config(["--precision", "bf16-mixed"]).precision == "bf16-mixed"
    assert parse_config(["--dataset", str(DEMO_FOLDER / "essay.txt")]).max_length == demo.max_length
    # The defaults of the demo are not those of a model.
    assert parse_config(MODEL).learning_rate != demo.learning_rate


def test_the_demo_overwrites_its_own_folder_and_no_other() -> None:
    for folder in ("full-ft-demo", "mine"):
        Path(folder).mkdir()
        Path(folder, "README.md").write_text("precious")
    assert parse_config([]).overwrite_output_dir
    assert "mine is not empty" in problems_of("--output_dir", "mine")[0]
    assert parse_config(["--output_dir", "mine", "--overwrite_output_dir"]).overwrite_output_dir


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("mistralai/Mistral-7B-v0.1", "./full-ft-Mistral-7B-v0.1"),
        ("gpt2", "./full-ft-gpt2"),
        ("./models/mine", "./full-ft-mine"),
        ("models/mine/", "./full-ft-mine"),
        ("/models/mine", "./full-ft-mine"),
        ("models/mine/.", "./full-ft-mine"),
    ],
)
def test_output_dir_is_named_after_the_model(model: str, folder: str) -> None:
    assert parse_config(["--model", model]).output_dir == folder


def test_a_data_set_of_ones_own_is_read_whole() -> None:
    assert parse_config([*MODEL, "--dataset", "rows.jsonl"]).dataset_split == "train"
    assert parse_config([*MODEL, "--dataset_split", "test"]).dataset_split == "test"


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
def test_a_flag_is_read_as(words: str, name: str, value: object) -> None:
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
def test_a_wrong_flag_is_answered_with(words: str, message: str) -> None:
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


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not with torchrun" in problems_of()[0]
    monkeypatch.setenv("WORLD_SIZE", "1")
    parse_config([])


def test_a_missing_package_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing = {"wandb", "bitsandbytes"}  # the second is needed on CUDA only, and said there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find_spec(name))
    assert problems_of("--report_to", "wandb,tensorboard", "--optim", "adamw_8bit") == [
        "report_to tensorboard,wandb needs wandb: pip install wandb",
    ]
    missing.clear()
    if find_spec("wandb") is None:
        Path("wandb").mkdir()  # what wandb leaves behind can be found, but is no package
        monkeypatch.syspath_prepend(Path.cwd())
        assert find_spec("wandb") is not None
        assert len(problems_of("--report_to", "wandb")) == 1


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
    ],
)
def test_a_yaml_line_is_read_as(text: str, name: str, value: object) -> None:
    assert getattr(parse_config(["--config", write_yaml(text)]), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1", "run.yaml: unknown option learnig_rate; did you mean learning_rate?"),
        ("bf16: true", "run.yaml: unknown option bf16; did you mean precision?"),
        ("1: 2", "run.yaml: unknown option 1; --help lists them all"),
        ("model: [a]", "run.yaml: model: takes one value, not a list"),
        ("optim: {name: adamw}", "run.yaml: optim: takes one value, not a mapping"),
        ("seed: true", "run.yaml: seed: 'True' is not a whole number"),
        ("seed: .nan", "run.yaml: seed: 'nan' is not a whole number"),
        ("output_dir: no", "run.yaml: output_dir: false is not text: write it in quotes"),
        ("save_strategy: yes", "run.yaml: save_strategy: 'true' is not one of no, epoch, steps"),
        ("packing: 3", "run.yaml: packing: '3' is neither true nor false"),
        ("columns: {output: ~}", "run.yaml: columns: 'output' needs a value"),
        ("columns: 3", "run.yaml: columns: 3 is no pair"),
        ("seed: 1\nseed: 2", "run.yaml: seed sets seed a second time"),
        ("model: a\nmodel_name_or_path: b", "run.yaml: model_name_or_path sets model a second time, after model"),
        ("- a\n- b", "--config run.yaml must hold `option: value` lines"),
        ("hello", "--config run.yaml must hold `option: value` lines"),
        ("a: [1\nb: 2", "--config run.yaml, line 2: not YAML: expected ',' or ']'"),
        ("model: !!python/object:os.system {}", "--config run.yaml, line 1: not YAML: could not determine"),
        ("model: caf\xe9".encode("latin-1"), "--config run.yaml is not UTF-8 text (byte 10)"),
    ],
)
def test_a_wrong_yaml_file_is_answered_with(text: str | bytes, message: str) -> None:
    (line,) = problems_of("--config", write_yaml(text))
    assert message in line


def test_a_config_that_is_no_file() -> None:
    Path("folder").mkdir()
    assert problems_of("--config", "nope.yaml") == ["--config nope.yaml: No such file or directory"]
    assert problems_of("--config", "folder") == ["--config folder: Is a directory"]


def test_a_flag_beats_the_file() -> None:
    file = write_yaml("model: a/b\nlearning_rate: 1.0\nseed: 1\npacking: true\ncolumns: {output: answer}\n")
    config = parse_config(["--config", file, "--learning_rate", "2", "--packing", "false", "--columns", "prompt=q"])
    assert (config.model, config.seed) == ("a/b", 1)
    assert (config.learning_rate, config.packing, config.columns) == (2.0, False, {"prompt": "q"})
    # With a model in the file, the demo's defaults are out.
    assert config.precision == Config().precision != parse_config([]).precision


@pytest.mark.parametrize(
    ("file", "flags", "batch"),
    [
        ("", "--per_device_train_batch_size 2", (2, 16, 32)),
        ("", "--per_device_train_batch_size 2 --global_batch_size 16", (2, 8, 16)),
        ("global_batch_size: 16", "--gradient_accumulation_steps 4", (1, 4, 4)),
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


def test_a_conflict_within_the_file_is_refused() -> None:
    file = write_yaml("model: a\ngradient_accumulation_steps: 3\nglobal_batch_size: 16\n")
    assert "global_batch_size 16 is not 1 x 3" in problems_of("--config", file)[0]


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


# ---------------------------------------------------------------------------------------------- folders


def test_output_dir_with_content_needs_a_decision() -> None:
    Path("out").mkdir()
    parse_config(["--output_dir", "out"])  # an empty one is fine
    Path("out", "notes.txt").write_text("mine")
    (line,) = problems_of("--output_dir", "out")
    for remedy in ("--resume_from_checkpoint", "--overwrite_output_dir", "--output_dir"):
        assert remedy in line
    parse_config(["--output_dir", "out", "--overwrite_output_dir"])
    parse_config(["--output_dir", "out", "--resume_from_checkpoint"])
    parse_config(["--output_dir", "out", "--resume_from_checkpoint", "out/checkpoint-5"])
    assert "not empty: a checkpoint from elsewhere" in problems_of(
        "--output_dir", "out", "--resume_from_checkpoint", "other/checkpoint-5"
    )[0]  # fmt: skip


def test_output_dir_that_cannot_be_one() -> None:
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere")
    for output_dir in ("file", "file/below/it", "dangling"):
        assert "is not a folder: choose another --output_dir" in problems_of("--output_dir", output_dir)[0]


def test_what_is_read_is_not_written_over() -> None:
    model = Path("out/checkpoint-5")
    model.mkdir(parents=True)
    Path("link").symlink_to("out")
    rows = Path("rows")
    rows.mkdir()
    overwrite = "--overwrite_output_dir"
    assert "the model's own folder" in problems_of("--model", "out/", "--output_dir", "./link", overwrite)[0]
    assert "may be deleted" in problems_of("--model", str(model), "--output_dir", "out", overwrite)[0]
    assert "read as rows" in problems_of("--dataset", "rows", "--output_dir", "rows/out")[0]
    assert "read as rows" in problems_of("--dataset", ".")[0]  # ./full-ft-demo lies in it
    # Beside them, or deeper in a folder that the run leaves alone, there is no danger.
    parse_config(["--model", "out/checkpoint-5", "--output_dir", "new"])
    parse_config(["--model", "out", "--output_dir", "out/tuned"])
    parse_config(["--dataset", "rows", "--output_dir", "rows-out"])


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_screen_and_names_everything(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = build_parser(Config).format_help()
    assert max(map(len, text.splitlines())) <= columns
    assert columns == 80 or max(map(len, text.splitlines())) > 80  # the wide one is used
    flat = " ".join(text.split())
    for name, option in by_name(Config).items():
        unit = f"[{option.metadata['unit']}]"
        entry = re.search(rf"--{name}\b.*?\(default: .*?\)", flat)
        assert entry and (unit == "[]" or unit in entry[0]), name
    for group in ("model and data:", "run:", "optimization:", "precision and memory:", "records:"):
        assert f"\n{group}\n" in text
    for shown in ("--max_length N", "--learning_rate X", "--packing [true|false]", "--output_dir FOLDER", "2e-5"):
        assert shown in flat


def test_the_table_of_options_lists_every_flag() -> None:
    table = options_table(Config)
    for name, option in by_name(Config).items():
        for flag in (name, *option.metadata["aliases"]):
            assert f"`--{flag}`" in table
    assert len(table.splitlines()) == 2 + len(by_name(Config)) + 5


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config([]).seed = 1  # type: ignore[misc]


def test_argv_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "5"])
    assert parse_config().seed == 5
