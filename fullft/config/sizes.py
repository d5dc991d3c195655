"""Amounts of memory as options write them: 24GiB, 24GB, 24."""

import re

_UNITS = {"": 2**30, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str) -> int:
    """Read an amount of memory.

    Args:
        text: as in 24GiB (2^30), 24GB (10^9), 24G or 24 (both GiB).

    Returns:
        Bytes.

    Raises:
        ValueError: it is no amount of memory.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kmgt]?(?:i?b)?)", text.strip().lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise ValueError(f"{text!r} is no amount of memory: write it as in 24GiB (2^30) or 24GB (10^9)")
    return round(float(match[1]) * _UNITS[match[2]])
