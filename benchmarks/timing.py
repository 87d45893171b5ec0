"""Rows of a result: the time of a call, or the reason why there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["attempt", "timed"]


def attempt(row: Mapping[str, Any], measurement: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row with what was measured, or why that could not be: the other rows are worth having without it.

    Args:
        row: what the row is of.
        measurement: gives the rest of it, or raises.

    >>> attempt({"what": "halves"}, lambda: {"value": 1 / 2}), attempt({"what": "none"}, lambda: {"value": 1 / 0})
    ({'what': 'halves', 'value': 0.5}, {'what': 'none', 'unavailable': 'ZeroDivisionError: division by zero'})
    """
    try:
        return {**row, **measurement()}
    except Exception as reason:
        return {**row, "unavailable": f"{type(reason).__name__}: {reason}"}


def timed(action: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Result and seconds of one call, device work included."""
    start = time.perf_counter()
    result = action()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
