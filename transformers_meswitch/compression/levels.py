"""The quantiser's levels: symmetric, mid-rise, ``(2c + 1 - 2^bits) / 2`` steps for code ``c``.

Mid-rise levels have no zero, so at 1 bit they are the signs of BitDelta (arXiv 2402.10193); a delta of exactly zero is
expressed by a step of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["code_values", "dequantize", "divisor", "nearest_levels", "quantize"]


def code_values(bits: int) -> Tensor:
    """Value of each code in units of the step size.

    Args:
        bits: bits of one code.

    Returns:
        float32 ``[2 ** bits]``, ascending and symmetric about zero.

    >>> code_values(2).tolist()
    [-1.5, -0.5, 0.5, 1.5]
    """
    codes = torch.arange(2**bits, dtype=torch.float32)
    return (2 * codes + 1 - 2**bits) / 2


def nearest_levels(scaled: Tensor, bits: int) -> Tensor:
    """Level nearest to each value, both in units of the step size.

    Args:
        scaled: float values, any shape.
        bits: bits of one code.

    Returns:
        As ``scaled``, each element one of :func:`code_values`; a value half way between two levels takes the upper.

    >>> nearest_levels(torch.tensor([-9.0, -0.2, 0.0, 0.9, 1.0]), bits=2).tolist()
    [-1.5, -0.5, 0.5, 0.5, 1.5]
    """
    half = 2 ** (bits - 1)
    return scaled.floor().clamp_(-half, half - 1).add_(0.5)


def divisor(step: Tensor) -> Tensor:
    """The step where it is positive, else one: ``x / step`` has no meaning at zero, where every value is zero anyway.

    Args:
        step: float, any shape, zero or more.

    >>> divisor(torch.tensor([0.0, 0.5])).tolist()
    [1.0, 0.5]
    """
    return torch.where(step > 0, step, torch.ones_like(step))


def quantize(delta: Tensor, step: Tensor, bits: int, column_step: Tensor | None = None) -> Tensor:
    """Code of the level nearest to each element.

    Args:
        delta: float32 ``[out, n]``.
        step: float32 ``[out]``, zero or more: step size of each row.
        bits: bits of one code.
        column_step: float32 ``[n]``, zero or more: factor on the step of each column.

    Returns:
        uint8 ``[out, n]``; 0 wherever the step is zero.

    >>> quantize(torch.tensor([[-0.3, 0.01, 0.12]]), torch.tensor([0.1]), bits=2).tolist()
    [[0, 2, 3]]
    """
    scaled = delta / divisor(step)[:, None]
    if column_step is not None:
        scaled /= divisor(column_step)
    codes = (nearest_levels(scaled, bits) + (2**bits - 1) / 2).to(torch.uint8)
    codes[step == 0] = 0
    if column_step is not None:
        codes[:, column_step == 0] = 0
    return codes


def dequantize(codes: Tensor, step: Tensor, bits: int, column_step: Tensor | None = None) -> Tensor:
    """Value of each code, ``(2c + 1 - 2^bits) / 2 * step[row] * column_step[column]``.

    Args:
        codes: uint8 ``[out, n]``.
        step: float32 ``[out]``.
        bits: bits of one code.
        column_step: float32 ``[n]``.

    Returns:
        float32 ``[out, n]``.

    >>> dequantize(torch.tensor([[0, 3]], dtype=torch.uint8), torch.tensor([2.0]), bits=2).tolist()
    [[-3.0, 3.0]]
    """
    values = (codes.to(torch.float32) - (2**bits - 1) / 2) * step[:, None]
    return values if column_step is None else values * column_step
