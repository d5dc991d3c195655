"""The records of a run: `config.yaml`, `log.jsonl`, `loss.png`, `train_results.json`, and what trackers are sent.

What they say is the business of `log.py`. Of several ranks, the first one keeps them.
"""

import json
from pathlib import Path
from typing import Any

from fullft.config.config import Config, to_yaml
from fullft.ranks import is_first
from fullft.run.trackers import open_trackers
from fullft.saving.files import write_text

Record = dict[str, Any]


class Records:
    """Keeps the records of a run.

    Args:
        config: `output_dir` and `report_to` are read; all options are recorded.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._folder = config, config.output_dir

    def open(self, first_step: int) -> list[Record]:
        """Begin, or go on where a resumed run is.

        Args:
            first_step: whatever was logged from there on is dropped.

        Returns:
            The records of the steps before.
        """
        write_text(self._folder / "config.yaml", to_yaml(self._config))
        self._trackers = open_trackers(self._config)
        log = self._folder / "log.jsonl"
        kept = [record for record in _read_log(log) if record["step"] < first_step]
        write_text(log, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def add(self, record: Record) -> None:
        """Append a record to the log, and send it to the trackers."""
        with (self._folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        for track in self._trackers:
            track(record)

    def draw(self, records: list[Record]) -> None:
        """Draw the losses, if there are any; a picture that fails is only reported.

        Args:
            records: of all steps so far.
        """
        if not any("loss" in record for record in records):
            return
        try:
            plot_loss(records, self._folder / "loss.png", title=self._folder.name)
        except Exception as error:  # must neither hide why a run failed, nor cost the model of one that did not
            print(f"warning: loss.png could not be drawn ({type(error).__name__}: {error})")

    def write_results(self, results: Record) -> None:
        """Write what the run has achieved."""
        write_text(self._folder / "train_results.json", json.dumps(results, indent=1))


class NoRecords:
    """Keeps nothing: the first rank does."""

    def open(self, first_step: int) -> list[Record]:
        """Return no records: the first rank's are sent to all."""
        return []

    def add(self, record: Record) -> None:
        """Do nothing."""

    def draw(self, records: list[Record]) -> None:
        """Do nothing."""

    def write_results(self, results: Record) -> None:
        """Do nothing."""


def records_of(config: Config) -> Records | NoRecords:
    """Return what keeps a run's records on this rank."""
    return Records(config) if is_first() else NoRecords()


def _read_log(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # a crash cut the last line short
    return records


def plot_loss(records: list[dict[str, Any]], file: Path, title: str) -> None:
    """Draw the training and the held-out loss over the steps.

    Args:
        records: lines of `log.jsonl`.
        file: the PNG to write.
        title: above the axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training (each logged step)", "-"), ("eval_loss", "held out", "o--")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
