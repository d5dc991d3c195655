"""Where parameters, gradients and optimizer states live: what `--offload` means.

Nothing is moved here: `storage/` makes the arrays, and `transforms/streaming.py` brings layers to the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from fullft.config.options import UNDECIDED

_TIERS = {
    "parameters": ("device", "host", "disk"),
    "gradients": ("device", "host", "disk", "released"),
    "optimizer": ("device", "host", "disk"),
}


@dataclass(frozen=True)
class Placement:
    """The tier of each thing: `device`, `host` or `disk`.

    Attributes:
        optimizer: the optimizer's states; also `paged`: on the device, moved to the host and back as CUDA sees fit.
        gradients: their sums; also `released`: each gradient is used up within backward.
        parameters: the weights of the decoder layers.
    """

    optimizer: str = "device"
    gradients: str = "device"
    parameters: str = "device"

    @staticmethod
    def parse(text: str) -> "Placement":
        """Read the option's words.

        Args:
            text: `none`, `auto` (nothing is moved until the plan decides), or a list as in
                optimizer=host,gradients=disk.

        Raises:
            ValueError: it is none of these.
        """
        placed: dict[str, str] = {}
        for word in text.split(",") if text not in ("none", UNDECIDED) else []:
            what, _, tier = word.strip().lower().partition("=")
            if tier not in _TIERS.get(what, ()):
                known = "; ".join(f"{name}={'|'.join(tiers)}" for name, tiers in _TIERS.items())
                raise ValueError(f"{word.strip()!r} is neither none nor one of {known}")
            if what in placed:
                raise ValueError(f"{what} is placed twice")
            placed[what] = tier
        return Placement(**placed)

    @property
    def offloaded(self) -> dict[str, str]:
        """The tier of each thing that is not simply on the device; `paged` states count as on the device."""
        tiers = {field.name: str(getattr(self, field.name)) for field in fields(self)}
        return {name: tier for name, tier in tiers.items() if tier not in ("device", "paged")}

    @property
    def streams_layers(self) -> bool:
        """Whether decoder layers are on the device only while they compute."""
        return self.parameters != "device"

    def __str__(self) -> str:
        """Write the option's words."""
        return ",".join(f"{name}={tier}" for name, tier in self.offloaded.items()) or "none"


def placements(tiers: tuple[str, ...]) -> Iterator[Placement]:
    """Yield every placement over the given tiers.

    Args:
        tiers: some of `device`, `host` and `disk`.
    """
    for optimizer in tiers:
        for gradients in tiers:
            for parameters in tiers:
                yield Placement(optimizer, gradients, parameters)
