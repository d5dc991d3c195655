"""What follows from the options: one typed object that the rest of the program reads.

Options are words; here they are parsed, once. Which options there are stands in `options.py`.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fullft.config.numerics import Numerics
from fullft.config.options import DEFAULT_DATASET, DEFAULT_DATASET_SPLIT, DEMO_ROWS, UNDECIDED, Options
from fullft.config.placement import Placement
from fullft.config.ranks import Group, Place, find_place, group_of
from fullft.config.recomputation import Recomputation
from fullft.config.sizes import parse_size

DEFAULT_GLOBAL_BATCH_SIZE = 16  # sequences
DEFAULT_VAL_SIZE = 0.05
_PLANNED_PER_NODE = 8  # GPUs, in a plan


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """A run's options, resolved: nothing is None that training needs, and words have become objects.

    What is still at auto means "nothing" (no recomputation, no offloading, no compilation) until the plan decides.
    """

    # Declared in `Options`; here they have a value.
    dataset: str
    dataset_split: str
    output_dir: Path
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    eval_steps: int
    val_size: float
    gpus: int

    # Whether the model tells documents of a row apart, so that sequences dealt by number may share one. The plan says.
    isolates_documents: bool = False

    @property
    def is_flat(self) -> bool:
        """Whether the sequences of a micro-batch lie behind each other in one row; else each has a row, and padding."""
        shares_rows = self.isolates_documents and self.per_device_train_batch_size > 1
        return shares_rows or bool(self.micro_batch_tokens)

    @property
    def joins_rows(self) -> bool:
        """Whether a row of a micro-batch holds several documents, which restarting positions tell apart."""
        return self.packing or self.is_flat

    @property
    def accumulates(self) -> bool:
        """Whether a rank has several micro-batches per step."""
        return self.gradient_accumulation_steps > 1

    @property
    def adds_gradients(self) -> bool:
        """Whether a step's gradients are sums: over micro-batches, or over ranks."""
        return self.accumulates or self.gpus > 1

    @cached_property
    def place(self) -> Place:
        """This process among the ranks; in a plan, the first one of those planned for."""
        return planned_place(self.gpus) if self.plan else find_place()

    @property
    def group(self) -> Group:
        """The ranks that share out a copy of the model; as long as `shard` is at auto, all of them."""
        return group_of(self.place, self.shard, self.shard_nodes)

    @cached_property
    def numerics(self) -> Numerics:
        """The formats of weights, gradients, moments and computation."""
        return Numerics.of(self.precision, self.master_weights, self.optim, self.adds_gradients)

    @cached_property
    def placement(self) -> Placement:
        """Where parameters, gradients and optimizer states live."""
        placement = Placement.parse(self.offload)
        if self.optim != "paged_adamw_8bit":
            return placement
        return Placement("paged", placement.gradients, placement.parameters)

    @cached_property
    def recomputation(self) -> Recomputation:
        """What backward recomputes."""
        return Recomputation.parse(self.activation_checkpointing)

    @property
    def compiles(self) -> bool:
        """Whether the decoder layers are compiled."""
        return self.compile == "true"

    @property
    def evaluates(self) -> bool:
        """Whether rows are held out, here or elsewhere."""
        return self.val_size > 0 or self.eval_dataset is not None or self.eval_split is not None

    @property
    def has_8bit_moments(self) -> bool:
        """Whether AdamW keeps its moments in 8 bits."""
        return self.optim != "adamw"

    @property
    def undecided(self) -> frozenset[str]:
        """The names of the options that are left to the plan."""
        left_open = ("activation_checkpointing", "offload", "compile", *(("shard",) if self.gpus > 1 else ()))
        by_tokens = ("micro_batch_tokens",) if self.micro_batch_tokens is None else ()
        return frozenset((*(name for name in left_open if getattr(self, name) == UNDECIDED), *by_tokens))

    @property
    def must_fit(self) -> bool:
        """Whether a run that does not fit is refused."""
        return self.fit == "auto"

    @property
    def trackers(self) -> list[str]:
        """The trackers that records also go to."""
        return [name for name in self.report_to.split(",") if name != "none"]

    @cached_property
    def device_memory_bytes(self) -> int | None:
        """The memory of the device to plan for, in bytes; None for that of the device at hand."""
        return None if self.device_memory is None else parse_size(self.device_memory)


def resolve(options: Options) -> Config:
    """Fill in what follows from the options; an option that has a value keeps it.

    Args:
        options: checked by `find_problems`.
    """
    dataset, split = options.dataset, options.dataset_split or "train"
    if dataset is None:
        dataset = DEMO_ROWS if options.model is None else DEFAULT_DATASET
        if options.model is not None and options.dataset_split is None:
            split = DEFAULT_DATASET_SPLIT
    values = {field.name: getattr(options, field.name) for field in fields(Options)}
    return Config(
        **values
        | _decided(options)
        | {
            "dataset": dataset,
            "dataset_split": split,
            "output_dir": output_dir_of(options),
            "per_device_train_batch_size": batch_size_of(options),
            "gradient_accumulation_steps": accumulation_of(options),
            "micro_batch_tokens": micro_batch_tokens_of(options),
            "global_batch_size": global_batch_size_of(options),
            "gpus": ranks_of(options),
            "eval_steps": options.eval_steps or options.logging_steps,
            "val_size": val_size_of(options),
        }
    )


def _decided(options: Options) -> dict[str, str]:
    """Settle what the plan has no choice about."""
    decided: dict[str, str] = {}
    # A layer whose weights leave the device must be recomputed.
    if options.activation_checkpointing == UNDECIDED and Placement.parse(options.offload).streams_layers:
        decided["activation_checkpointing"] = "full"
    if options.fit == "off":  # then auto means nothing
        nothings = {"activation_checkpointing": "none", "offload": "none", "compile": "false", "shard": "full"}
        for name, nothing in nothings.items():
            if getattr(options, name) == UNDECIDED:
                decided.setdefault(name, nothing)
    return decided


def planned_place(ranks: int) -> Place:
    """Return the place of the first of so many planned ranks, on nodes of eight."""
    return Place(0, ranks, 0, min(ranks, _PLANNED_PER_NODE))


def ranks_of(options: Options) -> int:
    """Return how many ranks train, or are planned for: as many as were started, else as many as asked for."""
    started = find_place().count
    return (options.gpus or 1) if options.plan or started == 1 else started


def global_batch_size_of(options: Options) -> int:
    """Return the sequences of a step: as given, as the factors make, or the default and what it lacks of a multiple."""
    if options.global_batch_size is not None:
        return options.global_batch_size
    factors = (options.per_device_train_batch_size, options.gradient_accumulation_steps)
    product = math.prod(each for each in factors if each is not None)
    if factors[1] is not None:
        product *= ranks_of(options)
    return product if None not in factors else -(-DEFAULT_GLOBAL_BATCH_SIZE // product) * product


def batch_size_of(options: Options) -> int:
    """Return the sequences of a micro-batch: as given, as the others make, or 1 until something is decided."""
    if options.per_device_train_batch_size is not None:
        return options.per_device_train_batch_size
    if options.gradient_accumulation_steps is None:
        return 1
    return max(1, global_batch_size_of(options) // (options.gradient_accumulation_steps * ranks_of(options)))


def accumulation_of(options: Options) -> int:
    """Return the most micro-batches that a rank has in a step: with ranks that do not divide them, some have fewer."""
    # Rounded up: a batch that does not divide is refused elsewhere, and still counts as accumulating.
    micro_batches = -(-global_batch_size_of(options) // batch_size_of(options))
    return -(-micro_batches // ranks_of(options))


def micro_batch_tokens_of(options: Options) -> int | None:
    """Return how many tokens a micro-batch has at most, None if the plan says it; 0 if it has so many sequences."""
    if options.micro_batch_tokens is not None:
        return options.micro_batch_tokens
    is_open = options.per_device_train_batch_size is None and options.gradient_accumulation_steps is None
    return None if is_open and options.fit != "off" else 0


def val_size_of(options: Options) -> float:
    """Return the share of rows that is held out: as given, or the default, unless held-out rows come from elsewhere."""
    if options.val_size is not None:
        return options.val_size
    return DEFAULT_VAL_SIZE if options.eval_dataset is None and options.eval_split is None else 0.0


def output_dir_of(options: Options) -> Path:
    """Return the folder that a run writes to: the one given, or one named after the model."""
    if options.output_dir is not None:
        return options.output_dir
    name = "demo" if options.model is None else Path(options.model).resolve().name
    return Path(f"full-ft-{name}")


def to_words(config: Config) -> dict[str, Any]:
    """Return every option under its name, as JSON and YAML can hold it."""
    values = {field.name: getattr(config, field.name) for field in fields(Options)}
    if config.micro_batch_tokens != 0:  # then it alone says how a step is dealt, as soon as that is decided
        values |= {"per_device_train_batch_size": None, "gradient_accumulation_steps": None}
    return values | {"output_dir": str(config.output_dir)}


# Meant for one run. In config.yaml they would make every later run overwrite or resume too.
_ONE_SHOT = ("overwrite_output_dir", "resume_from_checkpoint", "allow_changes", "plan", "preview", "json", "debug")


def to_yaml(config: Config) -> str:
    """Write the options as a file that `--config` reads back, without those that concern this run alone."""
    import yaml

    kept = {name: value for name, value in to_words(config).items() if name not in _ONE_SHOT and value is not None}
    return yaml.safe_dump(kept, sort_keys=False)
