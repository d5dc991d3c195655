"""Amounts of memory as options write them."""

import pytest

from fullft.config.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("24GiB", 24 * 2**30),
        ("24 gb", 24 * 10**9),
        (".5MiB", 2**19),
        ("1.5tb", 1_500_000_000_000),
        (" 7k ", 7 * 1024),
        ("1.5 gib", 3 * 2**29),
    ],
)
def test_a_size_is_read_in_bytes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "GiB", "-1GB", "24 giga", "24ib", "1e9", "two", "24XB", "24b"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory"):
        parse_size(text)
