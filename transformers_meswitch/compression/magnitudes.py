"""How often each magnitude occurs in a row, and the step size that such a histogram asks for.

A search over step sizes needs of a row only how much of it lies above each threshold. A histogram on a logarithmic
scale says so in one pass over the row, and all thresholds are then tried on its few hundred bins at once.

With thresholds at multiples of ``t``, an element of magnitude ``a`` gets the level ``1/2 + #{k >= 1: a >= k t}``, so
the sums that the best step for these levels is made of come from sums over the histogram from its top: with ``A(x)``
the weighted sum of magnitudes from ``x`` on, and ``N(x)`` their weighted number,

    ``sum w a q = A(0) / 2 + sum_k A(k t)`` and ``sum w q² = N(0) / 4 + sum_k 2 k N(k t)``.

The step is the first over the second, and lowers the error by the first squared over the second.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["NOT_FINITE", "bins", "count_magnitudes", "exact_weights", "is_coarse", "octave", "searched_step"]

#: Mantissa bits that tell bins of an octave apart, by the bits of a code: more levels need finer thresholds.
_FINENESS = {1: 4, 2: 4, 3: 5, 4: 6}
#: Octaves from the top within which a row's peak must be for the search to see enough of the row.
_NEAR_TOP = 4
#: What is smaller than the peak by more than these counts as zero: where it matters, the peak is lost anyway.
_OCTAVES = 16
_MANTISSA = 23
#: The octave of infinity and NaN.
NOT_FINITE = 255


def bins(bits: int) -> int:
    """How many bins a row has: one for each magnitude of few mantissa bits, and the last for zeros and next to zeros.

    >>> bins(2)
    257
    """
    return (_OCTAVES << _FINENESS[bits]) + 1


def octave(peak: Tensor) -> Tensor:
    """The octave of a magnitude: the exponent field of its float32, or of the least magnitude that has bins below it.

    Args:
        peak: float32 ``[rows]``, zero or more.

    Returns:
        int32 ``[rows]``.

    >>> octave(torch.tensor([1.0, 1.5, 2.0])).tolist()
    [127, 127, 128]
    """
    return (peak.view(torch.int32) >> _MANTISSA).clamp_min_(_OCTAVES + 1)


def exact_weights(weight: Tensor) -> Tensor:
    """Weights as whole numbers that can be summed over a row in any order without rounding.

    Args:
        weight: float32 ``[n]``, from zero to one.

    Returns:
        float64 ``[n]``, whole; their sum is below ``2 ** 52``.

    >>> exact_weights(torch.tensor([1.0, 0.5])).log2().tolist()
    [50.0, 49.0]
    """
    return (weight.double() * 2.0 ** (52 - len(weight).bit_length())).round_()


def count_magnitudes(delta: Tensor, top: Tensor, bits: int, weight: Tensor | None = None) -> Tensor:
    """The histogram of each row's magnitudes, the same on any device and in any order of summation.

    Args:
        delta: float32 ``[rows, n]``, contiguous, finite.
        top: int32 ``[rows]``: an :func:`octave` that nothing in the row is above.
        bits: bits of one code, 1 to 4.
        weight: float64 ``[n]``, see :func:`exact_weights`; `None` counts every element once.

    Returns:
        float64 with weights, else int32: ``[rows, bins(bits)]``, from the greatest magnitude downwards.

    >>> row, top = torch.tensor([[1.0, -3.0, 3.0]]), torch.tensor([128], dtype=torch.int32)
    >>> count_magnitudes(row, top, bits=2).nonzero().tolist()
    [[0, 8], [0, 32]]
    """
    rows, count, dropped = len(delta), bins(bits), _MANTISSA - _FINENESS[bits]
    end = torch.arange(count - 1, rows * count, count, dtype=torch.int32, device=delta.device)
    # Rounded to few mantissa bits, the bits of a float are a logarithmic scale; a row's bins follow the last row's.
    place = delta.view(torch.int32) & 0x7FFFFFFF
    place += 1 << (dropped - 1)
    place >>= dropped
    greatest = (end - (count - 1) + ((top + 1) << _FINENESS[bits]))[:, None]
    index = torch.minimum(torch.sub(greatest, place, out=place), end[:, None]).view(-1).long()
    if weight is None:
        counts = torch.zeros(rows * count, dtype=torch.int32, device=delta.device)
        counts.scatter_add_(0, index, torch.ones_like(place).view(-1))
    else:
        counts = torch.zeros(rows * count, dtype=torch.float64, device=delta.device)
        counts.scatter_add_(0, index, weight.repeat(rows))
    return counts.view(rows, count)


def is_coarse(counts: Tensor, bits: int) -> bool:
    """Whether the peak of some row is so far below the octave it was counted with that it is to be counted again.

    Args:
        counts: see :func:`count_magnitudes`.
        bits: bits of one code, 1 to 4.

    >>> row = torch.tensor([[0.1]])
    >>> [is_coarse(count_magnitudes(row, top + octave(row[0]), 2), 2) for top in (0, 5)]
    [False, True]
    """
    return bool((counts[:, : _NEAR_TOP << _FINENESS[bits]].sum(dim=1) == 0).any())


@functools.cache
def _magnitudes(bits: int, device: torch.device) -> Tensor:
    """What each bin stands for, over the magnitude that the top octave ends with: float32 ``[bins]``."""
    per_octave = 1 << _FINENESS[bits]
    index = torch.arange(bins(bits) - 1, 0, -1, dtype=torch.float64, device="cpu")
    magnitude = torch.exp2((index / per_octave).floor() - _OCTAVES) * (1 + index % per_octave / per_octave)
    return torch.cat([magnitude, magnitude.new_zeros(1)]).float().to(device)


@functools.cache
def _thresholds(bits: int, device: torch.device) -> list[Tensor]:
    """For each ``k``, the bin that ``k t`` falls into where ``t`` is the magnitude of each bin: int64 ``[bins]`` each.

    Shifted by one, and zero where ``k t`` is above all bins.
    """
    fineness, count = _FINENESS[bits], bins(bits)
    multiples = torch.arange(1, 2 ** (bits - 1), device="cpu")[:, None] * _magnitudes(bits, torch.device("cpu"))
    scale = ((multiples.view(torch.int32) + (1 << (_MANTISSA - fineness - 1))) >> (_MANTISSA - fineness)).long()
    return list((((127 << fineness) - scale) + 1).clamp(0, count).to(device))


def searched_step(counts: Tensor, top: Tensor, bits: int) -> Tensor:
    """The step size that loses least of each row, as far as its histogram tells.

    Args:
        counts: see :func:`count_magnitudes`.
        top: int32 ``[rows]``, the octave that they were counted with.
        bits: bits of one code, 1 to 4.

    Returns:
        float32 ``[rows]``; zero for rows of zeros.

    >>> row, top = torch.tensor([[1.0, -1.0, 3.0, -3.0]]), torch.tensor([128], dtype=torch.int32)
    >>> searched_step(count_magnitudes(row, top, bits=2), top, bits=2).tolist()
    [2.0]
    """
    number = counts.to(torch.float32)
    number_above, sum_above = (_from_top(part) for part in (number, number * _magnitudes(bits, counts.device)))
    product, square = 0.5 * sum_above[:, -1:], 0.25 * number_above[:, -1:]
    for k, place in enumerate(_thresholds(bits, counts.device), 1):
        product = product + sum_above.index_select(1, place)
        square = torch.add(square, number_above.index_select(1, place), alpha=2 * k)
    step = product / square
    best = (product * step).max(dim=1, keepdim=True).indices
    return torch.ldexp(step.gather(1, best).squeeze(1).nan_to_num_(), top - 126)


def _from_top(values: Tensor) -> Tensor:
    """Sums of nothing, of the first bin, of the first two and so on: ``[rows, bins + 1]`` from ``[rows, bins]``."""
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))
