"""Measure the mistakes of the usual listing of full fine-tuning, on a real model and real rows.

    python benchmarks/listing.py --dataset alpaca.json
    python benchmarks/listing.py --dataset alpaca.json --only adi   # the measurements with these letters

The listing has Alpaca prompts without the `input` field, no EOS, `padding="max_length"` with `labels =
input_ids.copy()`, pad = eos, and bf16 weights under torch's AdamW. Each claim is measured on SmolLM2-135M, with the
listing's way next to ours. A fixed sample of rows is used where the whole file would take too long. It prints one
table. Only the seconds vary by machine.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import datasets
from listing_data import cost_of_padding, dropped_input, lost_eos, packing_leaks, padding_in_the_loss
from listing_numerics import bf16_sums, bytes_per_parameter, mean_of_means, rounded_away_updates
from listing_rows import SAMPLE, Cells, Lesson, prepare
from smollm2_model import add_dataset_option
from transformers.utils import logging

MEASUREMENTS: dict[str, Callable[[Lesson], list[Cells]]] = {
    "a": padding_in_the_loss,
    "b": cost_of_padding,
    "c": dropped_input,
    "d": lost_eos,
    "e": bytes_per_parameter,
    "f": rounded_away_updates,
    "g": bf16_sums,
    "h": mean_of_means,
    "i": packing_leaks,
}


def main() -> None:
    """Measure every claim, then print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add_dataset_option(parser)
    letters = "".join(MEASUREMENTS)
    parser.add_argument("--only", default=letters, help=f"letters of the measurements to take (default: {letters})")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()

    lesson = prepare(Path(arguments.dataset))
    print(
        f"SmolLM2-135M-Instruct, {len(lesson.rows)} rows of {Path(arguments.dataset).name}; sample: {SAMPLE} of them",
        flush=True,
    )
    table = [("", "claim", "the listing", "ours"), ("---",) * 4]
    for letter, measure in MEASUREMENTS.items():
        if letter in arguments.only:
            start = time.perf_counter()
            table += [(letter, *cells) for cells in measure(lesson)]
            print(f"  {letter}: {measure.__doc__} {time.perf_counter() - start:.0f} s", flush=True)
    print()
    for cells in table:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
