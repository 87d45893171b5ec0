"""The quantiser's levels: symmetric, mid-rise, ``(2c + 1 - 2^bits) / 2`` steps for code ``c``.

Mid-rise levels have no zero, so at 1 bit they are the signs of BitDelta (arXiv 2402.10193); a delta of exactly zero is
expressed by a step of zero.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

__all__ = ["code_values", "codes_of", "dequantize", "dequantize_packed", "divisor", "nearest_levels", "quantize"]


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


def codes_of(levels: Tensor, bits: int) -> Tensor:
    """Codes of levels, the inverse of :func:`code_values`.

    Args:
        levels: float32, any shape, each element a level in units of the step size.
        bits: bits of one code.

    Returns:
        uint8 of the same shape.

    >>> codes_of(torch.tensor([-1.5, 0.5]), bits=2).tolist()
    [0, 2]
    """
    return (levels + (2**bits - 1) / 2).to(torch.uint8)


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
    half = 2 ** (bits - 1)
    # By way of signed bytes, to which processors convert several times faster.
    codes = scaled.floor_().clamp_(-half, half - 1).to(torch.int8).add_(half).view(torch.uint8)
    unused = step == 0
    if bool(unused.any()):
        codes[unused] = 0
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


#: Bits of the words that packed codes are looked up by: whole bytes, but three bits straddle them.
_WORD_BITS = {1: 8, 2: 8, 3: 12, 4: 8}


@functools.cache
def _levels_of_words(bits: int) -> Tensor:
    """Levels of all codes in a word: float32 ``[2^word bits, codes]``."""
    width = _WORD_BITS[bits]
    words = torch.arange(2**width)[:, None]
    return code_values(bits)[(words >> torch.arange(0, width, bits)) & (2**bits - 1)]


def dequantize_packed(packed: Tensor, step: Tensor, bits: int, n: int, column_step: Tensor | None = None) -> Tensor:
    """``dequantize(unpack(packed, bits, n), step, bits, column_step)``, several times faster: a table look-up a word.

    Args:
        packed: uint8 ``[out, ceil(n * bits / 8)]``.
        step: float32 ``[out]``.
        bits: bits of one code.
        n: codes in a row.
        column_step: float32 ``[n]``.

    Returns:
        float32 ``[out, n]``.

    >>> dequantize_packed(torch.tensor([[0b1100]], dtype=torch.uint8), torch.tensor([2.0]), bits=2, n=2).tolist()
    [[-3.0, 3.0]]
    """
    words = packed.to(torch.int32)
    if bits == 3:
        groups = nn.functional.pad(words, (0, -words.shape[1] % 3)).unflatten(1, (-1, 3))
        whole = groups[..., 0] | groups[..., 1] << 8 | groups[..., 2] << 16
        words = torch.stack([whole & 0xFFF, whole >> 12], dim=-1).flatten(1)
    values = nn.functional.embedding(words, _levels_of_words(bits).to(packed.device)).flatten(1)[:, :n]
    values = values * step[:, None]
    return values if column_step is None else values * column_step
