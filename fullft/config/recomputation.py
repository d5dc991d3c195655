"""What backward recomputes: what `--activation_checkpointing` means."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recomputation:
    """Which decoder layers backward recomputes, and how much of them.

    Attributes:
        every: each layer whose number is a multiple of this is recomputed whole: 1 is all of them, 0 none.
        selective: whether every layer is recomputed but for its matrix products and its attention.
    """

    every: int = 0
    selective: bool = False

    @staticmethod
    def parse(text: str) -> "Recomputation":
        """Read the option's word: `none`, `selective`, `full`, `every_<n>`, or `auto`, which recomputes nothing yet."""
        if text.startswith("every_"):
            return Recomputation(every=int(text.removeprefix("every_")))
        return Recomputation(every=int(text == "full"), selective=text == "selective")

    @property
    def is_any(self) -> bool:
        """Whether anything is recomputed."""
        return self.selective or self.every > 0

    @property
    def share(self) -> float:
        """The share of the layers that is recomputed whole."""
        return 1 / self.every if self.every else 0.0
