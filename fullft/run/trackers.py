"""Trackers: where records go besides `log.jsonl`."""

from collections.abc import Callable
from typing import Any

from fullft.config.config import Config, to_words
from fullft.errors import OptionsError

Record = dict[str, Any]


def open_trackers(config: Config) -> list[Callable[[Record], None]]:
    """Open the trackers that `--report_to` names.

    Args:
        config: also handed to wandb, as the run's options.

    Returns:
        Functions that take a record.

    Raises:
        OptionsError: a tracker's package is missing.
    """
    builders = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [builders[name](config) for name in config.trackers]


def _tensorboard(config: Config) -> Callable[[Record], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OptionsError("--report_to tensorboard needs tensorboard: pip install tensorboard") from error
    writer = SummaryWriter(log_dir=str(config.output_dir / "runs"))

    def report(record: Record) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, record["step"])
        writer.flush()

    return report


def _wandb(config: Config) -> Callable[[Record], None]:
    try:
        import wandb
    except ImportError as error:
        raise OptionsError("--report_to wandb needs wandb: pip install wandb") from error
    run = wandb.init(project="fullft", name=config.output_dir.name, dir=str(config.output_dir), config=to_words(config))
    return lambda record: run.log({n: v for n, v in record.items() if n != "step"}, step=record["step"])
