"""The command `fullft`, and `python -m fullft`: they run train.py, which is shipped once."""

import runpy
from pathlib import Path

_HERE = Path(__file__).parent
# Within an installed package it lies in it; in a checkout, next to it.
_PLACES = (_HERE / "train.py", _HERE.parent / "train.py")


def main() -> None:
    """Run train.py as `python train.py` does, with the same words of the command line."""
    runpy.run_path(str(next(place for place in _PLACES if place.is_file())), run_name="__main__")


if __name__ == "__main__":
    main()
