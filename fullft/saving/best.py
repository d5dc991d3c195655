"""The best checkpoint: the one with the lowest held-out loss, which `--load_best_model_at_end` exports.

It is found anew each time, among the checkpoints that are there, by the losses in the log. `trainer_state.json` records
it, so that a resumed run knows of one in another folder, and misses one that is gone. The first rank looks: others may
see a folder as it was a little earlier.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fullft.config.config import Config
from fullft.errors import CheckpointError
from fullft.model.load import reload_weights
from fullft.ranks import by_first_rank
from fullft.saving.checkpoint import Checkpoint, verify
from fullft.saving.output_dir import manifest_names, own_checkpoints, step_of
from fullft.transforms.streaming import stream_of


@dataclass(frozen=True)
class Exported:
    """The weights that a run exports: the step that they are of, and their held-out loss where it is known."""

    step: int
    eval_loss: float | None


class BestCheckpoint:
    """Finds the best checkpoint, and brings its weights back; without `--load_best_model_at_end` there is none.

    Args:
        config: `load_best_model_at_end`, `output_dir` and `trust_remote_code` are read.
        checkpoint: that the run resumes.

    Raises:
        CheckpointError: the best one so far is gone.
    """

    def __init__(self, config: Config, checkpoint: Checkpoint | None) -> None:
        self._config = config
        self._resumed: dict[Path, float] = {}
        best = checkpoint.state.get("best") if checkpoint is not None and config.load_best_model_at_end else None
        if checkpoint is not None and best is not None:
            folder = checkpoint.folder.parent / best["checkpoint"]
            if not by_first_rank(lambda: manifest_names(folder)):
                raise CheckpointError(
                    f"the best checkpoint so far, {folder} (held-out loss {best['eval_loss']:.4f}), is gone: put it "
                    "back, or resume with --load_best_model_at_end false"
                )
            self._resumed[folder] = best["eval_loss"]

    def including(self, step: int, eval_losses: Mapping[int, float]) -> dict[str, Any] | None:
        """Return what `trainer_state.json` records of the best checkpoint, once that of a step is there.

        Args:
            step: whose checkpoint is about to be saved.
            eval_losses: the held-out loss after each evaluated step.
        """
        output_dir = self._config.output_dir

        def note() -> dict[str, Any] | None:
            best = self._find(eval_losses, output_dir / f"checkpoint-{step}")
            if best is None:
                return None
            folder, eval_loss = best
            place = folder.name if folder.parent.resolve() == output_dir.resolve() else str(folder.resolve())
            return {"checkpoint": place, "step": step_of(folder), "eval_loss": eval_loss}

        return by_first_rank(note)

    def load(self, model: PreTrainedModel, last_step: int, eval_losses: Mapping[int, float]) -> Exported:
        """Put the weights of the best checkpoint into the model, and say so; the last weights may be the best.

        Args:
            model: trained; changed in place, wherever its weights live.
            last_step: that its weights are of.
            eval_losses: the held-out loss after each evaluated step.

        Raises:
            CheckpointError: the best checkpoint is damaged.
        """
        last = Exported(last_step, eval_losses.get(last_step))
        if not self._config.load_best_model_at_end:
            return last
        best = by_first_rank(lambda: self._find(eval_losses))
        if best is None:
            print("warning: no checkpoint has a held-out loss: the last weights are exported")
            return last
        folder, eval_loss = best
        lowest = min(eval_losses, key=eval_losses.__getitem__, default=last_step)
        is_lower = eval_losses.get(lowest, eval_loss) < eval_loss
        unsaved = f" (step {lowest}, with {eval_losses[lowest]:.4f}, has no checkpoint)" if is_lower else ""
        print(f"best checkpoint: step {step_of(folder)}, held-out loss {eval_loss:.4f}{unsaved}")
        if step_of(folder) != last_step:
            _reload(model, folder, self._config)
        return Exported(step_of(folder), eval_loss)

    def _find(self, eval_losses: Mapping[int, float], *coming: Path) -> tuple[Path, float] | None:
        if not self._config.load_best_model_at_end:
            return None
        here = {
            folder: eval_losses[step_of(folder)]
            for folder in [*own_checkpoints(self._config.output_dir), *coming]
            if step_of(folder) in eval_losses
        }
        found = (self._resumed | here).items()
        return min(found, key=lambda item: (item[1], step_of(item[0])), default=None)  # of equals the first


def _reload(model: PreTrainedModel, folder: Path, config: Config) -> None:
    try:
        verify(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"the best weights cannot be exported: {error}\n--resume_from_checkpoint with --load_best_model_at_end "
            "false exports the last ones"
        ) from error
    if (stream := stream_of(model)) is not None:
        stream.release()  # weights that are on the device, or on their way there, are old from now on
    reload_weights(config, model, folder)
