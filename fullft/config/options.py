"""Which options there are: the name, unit, default and limits of each. Flags, YAML keys and `--help` come from here.

`python -m fullft.config.options` prints the table of docs/reference/options.md.
"""

from dataclasses import dataclass
from pathlib import Path

from fullft.config.declare import option, options_table

DEMO_FOLDER = Path(__file__).parent.parent / "demo"
DEMO_ROWS = str(DEMO_FOLDER / "instructions.jsonl")
DEFAULT_DATASET, DEFAULT_DATASET_SPLIT = "tatsu-lab/alpaca", "train[:1000]"
COLUMNS = ("instruction", "input", "output", "prompt", "completion", "messages", "conversations", "text")
UNDECIDED = "auto"  # what the plan decides
NEWEST = "newest"  # what a bare --resume_from_checkpoint means


@dataclass(frozen=True)
class Options:
    """The options of one run, as words and numbers. Names follow Hugging Face's `TrainingArguments` and TRL."""

    # --- model and data
    model: str | None = option(
        None,
        "hub id or folder of a causal language model",
        group="model and data",
        metavar="ID|FOLDER",
        is_path=True,
        aliases=("model_name_or_path",),
        called=("base_model", "model_id", "model_path"),
        shown="the built-in demo",
    )
    trust_remote_code: bool = option(False, "run model code that comes with the weights")
    dataset: str | None = option(
        None,
        "hub id; a .json .jsonl .csv .tsv .parquet .txt file (.gz too) or a folder of them; a save_to_disk folder",
        metavar="ID|PATH",
        is_path=True,
        aliases=("dataset_name",),
        called=("train_file", "dataset_path", "train_data", "dataset_name_or_path"),
        shown=DEFAULT_DATASET,
    )
    dataset_split: str | None = option(
        None,
        "which rows to use",
        metavar="SPLIT",
        called=("split", "max_train_samples", "max_samples"),
        shown=f"train; of the default dataset {DEFAULT_DATASET_SPLIT}",
    )
    eval_dataset: str | None = option(
        None,
        "held-out rows from here: as --dataset, or nothing for a split of --dataset's own",
        metavar="ID|PATH",
        is_path=True,
        called=("validation_file", "eval_file", "test_file"),
        shown="none",
    )
    eval_split: str | None = option(
        None,
        "the split that holds the held-out rows",
        metavar="SPLIT",
        called=("validation_split", "test_split"),
        shown="none; the only one of --eval_dataset",
    )
    dataset_text_field: str = option("text", "the column of plain text", metavar="COLUMN")
    columns: dict[str, str] = option(
        {}, "rename columns, as in output=answer; ours", metavar="OURS=YOURS ...", choices=COLUMNS, shown="as named"
    )
    max_length: int = option(
        512,
        "longest sequence",
        unit="tokens",
        called=("max_seq_length", "max_seq_len", "cutoff_len", "block_size"),
        at_least=2,
    )
    packing: bool = option(False, "fill sequences with several documents, each isolated from the others")
    train_on_prompt: bool = option(False, "count prompt tokens in the loss too")
    sanitize_special_tokens: bool = option(
        False, "encode special tokens that stand in the rows' own text, such as <|im_end|>, as plain text"
    )
    val_size: float | None = option(
        None,
        "rows held out for evaluation",
        unit="fraction of rows",
        at_least=0,
        below=1,
        shown="0.05; with --eval_dataset or --eval_split 0",
    )
    preview: int = option(
        0,
        "show so many rows as they are trained on, with what is learned marked, and exit",
        unit="rows",
        at_least=0,
        shown="none",
        may_change=True,
    )

    # --- run
    output_dir: Path | None = option(
        None,
        "folder for everything that the run writes",
        group="run",
        metavar="FOLDER",
        is_path=True,
        shown="./full-ft-<model's last name>",
        may_change=True,
    )
    overwrite_output_dir: bool = option(
        False,
        "replace an earlier run's files in that folder, and no other files",
        called=("overwrite",),
        may_change=True,
    )
    num_train_epochs: float = option(
        3.0, "passes over the training rows", unit="epochs", called=("epochs", "num_epochs"), above=0
    )
    max_steps: int = option(
        -1, "length of the run; above 0 it replaces num_train_epochs", unit="optimizer steps", at_least=-1
    )
    seed: int = option(42, "seed of the order, of the held-out rows and of dropout", at_least=0, below=2**32)
    per_device_train_batch_size: int | None = option(
        None,
        "size of a micro-batch; auto: by tokens, as the plan finds fastest",
        unit="sequences",
        called=("batch_size", "train_batch_size", "micro_batch_size", "per_device_batch_size"),
        spellings={"auto": None},
        at_least=1,
        shown="auto",
    )
    gradient_accumulation_steps: int | None = option(
        None,
        "how many micro-batches make an optimizer step",
        unit="micro-batches",
        called=("grad_accum", "accumulation_steps"),
        spellings={"auto": None},
        at_least=1,
        shown="auto",
    )
    micro_batch_tokens: int | None = option(
        None,
        "the most that a micro-batch has, where a step's sequences are dealt by tokens",
        unit="tokens",
        spellings={"auto": None},
        at_least=0,
        shown="auto",
    )
    global_batch_size: int | None = option(
        None,
        "how many sequences make an optimizer step, on all devices together",
        unit="sequences",
        at_least=1,
        shown="16",
    )
    resume_from_checkpoint: str | None = option(
        None,
        "continue a run; without a value, from the newest good checkpoint",
        metavar="CHECKPOINT",
        is_path=True,
        called=("resume", "resume_from"),
        spellings={"true": NEWEST, "false": None},
        bare=NEWEST,
        shown="off",
        may_change=True,
    )
    allow_changes: bool = option(False, "resume although options or data have changed", may_change=True)

    # --- optimization
    optim: str = option(
        "adamw",
        "AdamW with fp32 moments, or with 8-bit ones",
        group="optimization",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit"),
        called=("optimizer",),
        spellings={
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "adamw_hf": "adamw",
            "adamw_bnb_8bit": "adamw_8bit",
            "paged_adamw_bnb_8bit": "paged_adamw_8bit",
        },
    )
    learning_rate: float = option(2e-5, "peak learning rate", called=("lr",), at_least=0)
    lr_scheduler_type: str = option(
        "linear",
        "learning-rate schedule",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
        called=("lr_scheduler", "scheduler", "lr_schedule"),
    )
    warmup_steps: float = option(
        0.0,
        "learning-rate warmup; below 1 a fraction of all steps",
        unit="optimizer steps",
        called=("warmup_ratio", "warmup"),
        at_least=0,
    )
    weight_decay: float = option(0.0, "decoupled weight decay, not of biases and norms", at_least=0)
    max_grad_norm: float = option(
        1.0,
        "clip gradients to this global norm; 0 turns clipping off",
        called=("grad_clip", "gradient_clipping"),
        at_least=0,
    )
    adam_beta1: float = option(0.9, "decay of the first moment", at_least=0, below=1)
    adam_beta2: float = option(0.999, "decay of the second moment", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "added to the update's denominator", above=0)

    # --- precision and memory
    precision: str = option(
        "bf16-true",
        "fp32 weights; fp32 weights under bf16 autocast; or bf16 weights",
        group="precision and memory",
        choices=("fp32", "bf16-mixed", "bf16-true"),
        called=("bf16", "fp16", "dtype", "torch_dtype", "mixed_precision", "tf32"),
        spellings={"fp32_true": "fp32", "32": "fp32", "32_true": "fp32", "float32": "fp32", "bf16": "bf16-mixed"},
    )
    activation_checkpointing: str = option(
        "auto",
        "what backward recomputes: nothing; all but matrix products and attention; whole decoder layers; every n-th "
        "layer; auto: as little as fits",
        choices=("none", "selective", "full", "every_<n>", "auto"),
        aliases=("gradient_checkpointing",),
        spellings={"true": "full", "false": "none"},
        bare="full",
        may_change=True,  # gradients are the same to the bit, if layers are not compiled
    )
    master_weights: str = option(
        "split",
        "how bf16 weights are updated, with precision bf16-true: split keeps 16 more bits per weight, exact fp32; "
        "stochastic rounds up or down at random; none rounds to the nearest",
        choices=("split", "stochastic", "none"),
    )
    offload: str = option(
        "auto",
        "keep optimizer, gradients or parameters on host or disk; gradients=released uses each up within backward; "
        "auto: as the plan chooses",
        metavar="none|WHAT=WHERE ...",
        called=("cpu_offload", "offload_optimizer", "offload_param"),
        spellings={"true": "optimizer=host", "false": "none", "cpu": "optimizer=host"},
        several=True,
        may_change=True,  # the trajectory is the same to the bit, if layers are not compiled
    )
    compile: str = option(
        "auto",
        "compile the decoder layers; auto: if the run is long enough to gain",
        choices=("auto", "true", "false"),
        called=("torch_compile",),
        spellings={"1": "true", "0": "false"},
        bare="true",
    )
    fit: str = option(
        "auto",
        "auto: the plan sets what is left at auto to the fastest choice that fits; off: auto means none",
        choices=("auto", "off"),
        may_change=True,
    )
    plan: bool = option(False, "print where every byte would go, and exit", called=("dry_run",), may_change=True)
    json: bool = option(False, "print the plan, or the preview, as JSON", may_change=True)
    device_memory: str | None = option(
        None,
        "plan for a card of this size, as in 24GiB (2^30) or 24GB (10^9)",
        metavar="SIZE",
        called=("gpu_memory", "vram"),
        shown="this device's",
        may_change=True,
    )
    gpus: int | None = option(
        None,
        "start so many ranks on this machine; with --plan, plan for so many in all",
        unit="ranks",
        called=("num_gpus", "nproc_per_node", "num_processes", "devices", "n_gpu"),
        at_least=1,
        shown="1; under torchrun or Slurm as many as they start",
        may_change=True,
    )
    shard: str = option(
        "auto",
        "what the ranks share out among them: nothing (DDP); optimizer states (ZeRO-1); gradients too (ZeRO-2); "
        "parameters too (ZeRO-3); auto: the fastest that fits",
        choices=("none", "optimizer", "gradients", "full", "auto"),
        called=("fsdp", "deepspeed", "zero_stage", "sharding_strategy"),
        spellings={"ddp": "none", "zero1": "optimizer", "zero2": "gradients", "zero3": "full"},
        may_change=True,  # up to the order of sums, as the number of ranks
    )
    shard_nodes: int | None = option(
        None,
        "share out among the ranks of so many nodes, and keep a copy in each such group; 1: within each node (hybrid)",
        unit="nodes",
        at_least=1,
        shown="all",
        may_change=True,
    )
    ddp_timeout: int = option(
        1800, "how long a rank waits for the others before the run ends", unit="seconds", at_least=1, may_change=True
    )
    gpu_hour_price: float | None = option(
        None, "show the plan's cost", unit="any currency per GPU-hour", above=0, shown="none", may_change=True
    )

    # --- records
    logging_steps: int = option(
        10, "log every N steps", group="records", unit="optimizer steps", at_least=1, may_change=True
    )
    eval_strategy: str = option(
        "epoch",
        "when to evaluate, besides before and after training",
        choices=("no", "epoch", "steps"),
        called=("evaluation_strategy",),
        may_change=True,
    )
    eval_steps: int | None = option(
        None,
        "evaluate every N steps, with eval_strategy steps",
        unit="optimizer steps",
        at_least=1,
        shown="logging_steps",
        may_change=True,
    )
    save_strategy: str = option(
        "epoch",
        "when to save a checkpoint, besides after the last step",
        choices=("no", "epoch", "steps"),
        may_change=True,
    )
    save_steps: int = option(
        500,
        "save every N steps, with save_strategy steps",
        unit="optimizer steps",
        at_least=1,
        may_change=True,
    )
    save_total_limit: int | None = option(
        None, "keep only the newest ones", unit="checkpoints", at_least=1, shown="all", may_change=True
    )
    load_best_model_at_end: bool = option(
        False,
        "export the checkpoint with the lowest held-out loss, not the last weights; it is never deleted",
        may_change=True,
    )
    report_to: str = option(
        "none",
        "also log to a tracker",
        choices=("none", "tensorboard", "wandb", "tensorboard,wandb"),
        spellings={"wandb,tensorboard": "tensorboard,wandb", "all": "tensorboard,wandb", "false": "none"},
        may_change=True,
    )
    memory_snapshot: bool = option(
        False, "on CUDA, record the worst step's allocations for pytorch.org/memory_viz", may_change=True
    )
    debug: bool = option(False, "show tracebacks", may_change=True)


if __name__ == "__main__":
    print(options_table(Options))
