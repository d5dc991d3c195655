"""Number formats: what precision, master weights and optimizer mean together, against a table written by hand."""

import pytest
import torch
from models import make_config

from fullft.config.numerics import Format, Numerics
from fullft.model.precision import dtype_of

# precision, master_weights: the weights, the computation, the masters, the sums of gradients of a step with several
# micro-batches and with one, the moments of plain AdamW.
TABLE = """
    fp32        split       fp32  fp32  none        fp32  fp32  fp32
    fp32        stochastic  fp32  fp32  none        fp32  fp32  fp32
    fp32        none        fp32  fp32  none        fp32  fp32  fp32
    bf16-mixed  split       fp32  bf16  none        fp32  fp32  fp32
    bf16-mixed  stochastic  fp32  bf16  none        fp32  fp32  fp32
    bf16-mixed  none        fp32  bf16  none        fp32  fp32  fp32
    bf16-true   split       bf16  bf16  split       fp32  bf16  fp32
    bf16-true   stochastic  bf16  bf16  stochastic  fp32  bf16  fp32
    bf16-true   none        bf16  bf16  none        bf16  bf16  bf16
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
FORMATS = {"fp32": Format.FP32, "bf16": Format.BF16}


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[:2]))
def test_formats_are_those_of_the_table(row: list[str], optim: str, accumulates: bool) -> None:
    precision, master_weights, weights, computation, masters, several, single, moments = row
    config = make_config(
        precision=precision,
        master_weights=master_weights,
        optim=optim,
        gradient_accumulation_steps=4 if accumulates else 1,
    )
    numerics = config.numerics
    assert numerics == Numerics(
        FORMATS[weights],
        FORMATS[computation],
        masters,
        FORMATS[several if accumulates else single],
        FORMATS[moments] if optim == "adamw" else Format.EIGHT_BIT,
    )
    assert numerics.autocast == (precision == "bf16-mixed")
    assert numerics.splits == (masters == "split")


@pytest.mark.parametrize(
    ("number_format", "dtype"),
    [(Format.FP32, torch.float32), (Format.BF16, torch.bfloat16), (Format.EIGHT_BIT, torch.uint8)],
)
def test_a_format_has_the_bytes_of_its_dtype(number_format: Format, dtype: torch.dtype) -> None:
    assert dtype_of(number_format) == dtype
    assert number_format.bytes == dtype.itemsize
