"""Sizes in bytes as people write them: ``1.2GB``, ``800 MB``, ``1GiB``."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = ["parse_size"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Bytes that a text stands for; a part of a byte is left out.

    Args:
        text: a number, which may have decimals, and a unit: none or ``B`` for bytes, ``kB`` to ``TB`` for powers of
            1,000, ``KiB`` to ``TiB`` for powers of 1,024, in any case.

    Raises:
        ValueError: a text of another form.

    >>> parse_size("1.2GB"), parse_size("800 mb"), parse_size("1GiB"), parse_size("4096")
    (1200000000, 800000000, 1073741824, 4096)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text.strip())
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no size such as '1.2GB', '800MB' or '1GiB'")
    return int(Decimal(match[1]) * unit)
