"""Checks of the options against each other and against the disk."""

import importlib.util
from pathlib import Path

import pytest
from command_lines import problems_of, write_yaml

from fullft.config.config import to_yaml
from fullft.config.parse import parse_config

# ---------------------------------------------------------------------------------------------- defaults


def test_the_demo_overwrites_its_own_folder_alone() -> None:
    for folder in ("full-ft-demo", "mine"):
        Path(folder).mkdir()
        Path(folder, "README.md").write_text("precious")
    assert parse_config([]).overwrite_output_dir
    assert "mine is not empty" in problems_of("--output_dir", "mine")[0]
    assert parse_config(["--output_dir", "mine", "--overwrite_output_dir"]).overwrite_output_dir


# ---------------------------------------------------------------------------------------------- flags


def test_the_batch_is_dealt_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_config(["--gpus", "4"]).gpus == 4
    for words, accumulation, whole in (
        (["--gpus", "4", "--global_batch_size", "16"], 4, 16),
        (["--gpus", "3", "--global_batch_size", "16"], 6, 16),  # two ranks have 5 micro-batches
        (["--gpus", "4", "--gradient_accumulation_steps", "2"], 2, 16),
    ):
        config = parse_config(["--model", "m", *words])
        assert (config.gradient_accumulation_steps, config.global_batch_size) == (accumulation, whole), words
    assert (
        "is not 1 x 2 x 4 ranks"
        in problems_of(
            *"--model m --gpus 4 --per_device_train_batch_size 1 --gradient_accumulation_steps 2".split(),
            *"--global_batch_size 16".split(),
        )[0]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert parse_config([]).gpus == 2


@pytest.mark.parametrize(("gpus", "started"), [(3, 1), (3, 2), (2, 4), (1, 4)])
def test_a_runs_own_file_serves_other_numbers_of_ranks(
    gpus: int, started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The global batch stays, also where the ranks do not divide it."""
    config = parse_config(
        ["--model", "m", "--per_device_train_batch_size", "8", "--global_batch_size", "16", "--gpus", str(gpus)]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    if started > 1:
        monkeypatch.setenv("WORLD_SIZE", str(started))
        monkeypatch.setenv("RANK", "0")
    for flags in ([], ["--gpus", "1"]) if started == 1 else ([],):
        again = parse_config(["--config", str(tmp_path / "config.yaml"), *flags])
        ranks = started if started > 1 else int(flags[-1]) if flags else gpus
        assert (again.gpus, again.global_batch_size) == (ranks, 16)
        assert again.gradient_accumulation_steps == -(-2 // ranks)


def test_another_number_of_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert problems_of("--gpus", "4") == ["--gpus 4 does nothing where 8 ranks have been started: leave it out"]
    assert parse_config(["--gpus", "8"]).gpus == parse_config([]).gpus == 8
    assert parse_config(["--config", write_yaml("gpus: 4")]).gpus == 8  # a run's own config.yaml has it
    assert parse_config(["--gpus", "4", "--plan"]).gpus == 4


def test_streamed_layers_need_one_rank() -> None:
    offload = ["--offload", "parameters=host"]
    for shard in ("full", "none", "auto"):
        (line,) = problems_of("--gpus", "4", "--shard", shard, *offload)
        assert line.startswith("offload: parameters=host brings layers from one rank's host") and "1/4 of them" in line
    assert parse_config(["--shard", "full", *offload]).gpus == 1
    assert parse_config(["--gpus", "4", "--shard", "full", "--offload", "optimizer=host"]).gpus == 4


def test_nodes_divide_into_equal_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of("--shard_nodes", "2", "--gpus", "4") == [
        "shard_nodes 2 does not divide 1 node: choose 1, or leave it out"
    ]
    for name, value in {"WORLD_SIZE": "32", "RANK": "0", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert problems_of("--shard_nodes", "3") == [
        "shard_nodes 3 does not divide 4 nodes: choose 1 or 2 or 4, or leave it out"
    ]
    assert parse_config(["--shard_nodes", "2"]).shard_nodes == 2
    assert parse_config(["--shard_nodes", "3", "--plan", "--gpus", "24"]).shard_nodes == 3
    assert problems_of("--shard_nodes", "2", "--shard", "none") == [
        "--shard_nodes does nothing with shard none: leave it out"
    ]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert "as many ranks on every node" in problems_of("--shard_nodes", "1")[0]


def test_a_missing_package_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing = {"wandb", "bitsandbytes"}  # the second is needed on CUDA only, and said there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find_spec(name))
    assert problems_of("--report_to", "wandb,tensorboard", "--optim", "adamw_8bit") == [
        "report_to tensorboard,wandb needs wandb: pip install wandb",
    ]
    missing.clear()
    if find_spec("wandb") is None:
        Path("wandb").mkdir()  # what wandb leaves behind can be found, but is not a package
        monkeypatch.syspath_prepend(Path.cwd())
        assert find_spec("wandb") is not None
        assert len(problems_of("--report_to", "wandb")) == 1


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


def test_output_dir_that_is_no_folder_is_refused() -> None:
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere")
    for output_dir in ("file", "file/below/it", "dangling"):
        assert "is not a folder: choose another --output_dir" in problems_of("--output_dir", output_dir)[0]


def test_output_dir_must_not_overwrite_what_is_read() -> None:
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
    assert "folder of eval_dataset" in problems_of("--eval_dataset", "rows", "--output_dir", "rows/out")[0]
    # Next to them, or deeper in a folder that the run leaves alone, nothing is in danger.
    parse_config(["--model", "out/checkpoint-5", "--output_dir", "new"])
    parse_config(["--model", "out", "--output_dir", "out/tuned"])
    parse_config(["--dataset", "rows", "--output_dir", "rows-out"])


# ---------------------------------------------------------------------------------------------- the best checkpoint

BEST = "--model x --load_best_model_at_end"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--save_strategy steps --eval_strategy steps --save_steps 30 --eval_steps 10",
        "--save_strategy steps --eval_strategy steps --save_steps 30 --logging_steps 15",
        "--load_best_model_at_end false --eval_strategy no",
    ],
)
def test_the_best_checkpoint_can_be_told(words: str) -> None:
    parse_config([*BEST.split(), *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--val_size 0", "needs held-out rows to tell which is best: add --val_size 0.05"),
        ("--save_strategy no", "save_strategy is no, eval_strategy epoch: add --save_strategy epoch"),
        ("--eval_strategy no", "save_strategy is epoch, eval_strategy no: add --save_strategy epoch"),
        ("--eval_strategy steps", "save_strategy is epoch, eval_strategy steps: add --eval_strategy epoch"),
        (
            "--save_strategy steps --save_steps 30",
            "save_strategy is steps, eval_strategy epoch: add --eval_strategy steps --eval_steps 30",
        ),
        (
            "--save_strategy steps --eval_strategy steps --save_steps 30 --eval_steps 20",
            "save_steps 30 is not a multiple of eval_steps 20: add --eval_steps 30",
        ),
        (
            "--save_strategy steps --eval_strategy steps --save_steps 30 --logging_steps 7",
            "save_steps 30 is not a multiple of eval_steps 7: add --eval_steps 30",
        ),
    ],
)
def test_the_best_checkpoint_cannot_be_told(words: str, message: str) -> None:
    (line,) = problems_of(*BEST.split(), *words.split())
    assert line.startswith("load_best_model_at_end ") and message in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--per_device_train_batch_size 2", "per_device_train_batch_size"),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps"),
    ],
)
def test_a_step_is_dealt_by_tokens_or_by_number(words: str, named: str) -> None:
    found = problems_of("--model", "m", "--micro_batch_tokens", "512", *words.split())
    assert found == [f"micro_batch_tokens deals a step by tokens, {named} by number: leave out one of the two"]
    # In a file, such as a run's own, either gives way to a flag.
    Path("own.yaml").write_text("model: m\nmicro_batch_tokens: 512\nglobal_batch_size: 16\n")
    config = parse_config(["--config", "own.yaml", *words.split()])
    assert config.micro_batch_tokens == 0 and config.global_batch_size == 16
    Path("own.yaml").write_text(f"model: m\n{named}: 2\nglobal_batch_size: 16\n")
    assert parse_config(["--config", "own.yaml", "--micro_batch_tokens", "512"]).micro_batch_tokens == 512


def test_auto_is_a_word_for_the_batch() -> None:
    words = "--model m --per_device_train_batch_size auto --gradient_accumulation_steps auto --micro_batch_tokens auto"
    assert parse_config(words.split()) == parse_config(["--model", "m"])
