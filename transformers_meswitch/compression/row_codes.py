"""Codes, step sizes and salient channels of a delta whose rows are fitted one by one, in two passes over its rows.

The first pass finds each row's step and what every channel loses at it, by which salient channels are chosen. The
second takes those channels out of the rows' histograms, fits the steps to what is left, and writes the codes. Rows are
formed block by block when they are needed, so the delta is never held in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import over_blocks
from .differences import Difference
from .finite import require_finite
from .levels import divisor, nearest_levels, quantize
from .magnitudes import NOT_FINITE, count_magnitudes
from .packing import pack
from .saliency import select_salient
from .step_size import RowFit, Weights, fit_rows

__all__ = ["DELTA_NOT_FINITE", "RowCodes", "code_rows", "salient_channels_of"]

#: What such a delta is told of, and the way out.
DELTA_NOT_FINITE = (
    "the weight delta",
    "The base or the expert holds NaN, infinite or huge weights; compress an intact checkpoint.",
)


@dataclass(frozen=True)
class RowCodes:
    """A delta in codes.

    Attributes:
        codes: uint8 ``[out, packed width]``, of the channels that are not salient.
        step: float32 ``[out]``.
        salient_index: int64 ``[k]``, ascending.
        salient: float32 ``[out, k]``, the delta of the salient channels.
    """

    codes: Tensor
    step: Tensor
    salient_index: Tensor
    salient: Tensor


def code_rows(delta: Difference, bits: int, salient_channels: int, second_moment: Tensor | None = None) -> RowCodes:
    """Quantise a delta, keeping its channels of largest reconstruction error (see :mod:`.saliency`).

    Args:
        delta: ``[out, n]``, not empty.
        bits: bits of one code, 1 to 4.
        salient_channels: channels to keep, 0 to ``n``.
        second_moment: float32 ``[n]``, zero or more: mean square of each input channel; `None` weighs all alike.

    Raises:
        CompressionError: a NaN or infinite element.

    >>> found = code_rows(Difference(torch.zeros(1, 3), torch.tensor([[0.5, 7.0, -0.5]])), 1, salient_channels=1)
    >>> found.salient_index.tolist(), found.step.tolist(), found.codes.tolist()
    ([1], [1.0], [[1]])
    """
    weights = Weights.of(second_moment, delta.device)
    salient, fits = _first_pass(delta, bits, salient_channels, weights)
    is_coded = torch.ones(delta.shape[1], dtype=torch.bool, device=delta.device)
    is_coded[salient] = False
    coded = is_coded.nonzero().squeeze(1)
    of_salient, of_coded = (None if weights is None else weights.at(channels) for channels in (salient, coded))

    def second_pass(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, fit = delta.rows(start, stop), fits[start]
        columns, rest = rows.index_select(1, salient), rows.index_select(1, coded)
        gone = count_magnitudes(columns, fit.top, bits, None if of_salient is None else of_salient.whole)
        step = fit_rows(rest, bits, of_coded, (fit.counts - gone, fit.top)).step
        return pack(quantize(rest, step, bits), bits), step, columns

    parts = over_blocks(second_pass, delta.shape, delta.device)
    codes, step, columns = (torch.cat(part) for part in zip(*parts, strict=True))
    return RowCodes(codes, step, salient, columns)


def salient_channels_of(delta: Difference, bits: int, salient_channels: int, second_moment: Tensor | None) -> Tensor:
    """The channels that :func:`code_rows` keeps: int64 ``[k]``, ascending."""
    return _first_pass(delta, bits, salient_channels, Weights.of(second_moment, delta.device))[0]


def _first_pass(
    delta: Difference, bits: int, salient_channels: int, weights: Weights | None
) -> tuple[Tensor, dict[int, RowFit]]:
    """Salient channels, and the fits of all channels by the first row of each block."""

    def work(start: int, stop: int) -> tuple[int, RowFit, Tensor]:
        rows = delta.rows(start, stop)
        fit = fit_rows(rows, bits, weights, settle=False)
        rows /= divisor(fit.step)[:, None]
        error = nearest_levels(rows, bits).sub_(rows).square_()
        return start, fit, fit.step.square() @ error

    parts = over_blocks(work, delta.shape, delta.device)
    if bool((torch.cat([fit.top for _, fit, _ in parts]) == NOT_FINITE).any()):
        require_finite(delta.whole(), *DELTA_NOT_FINITE)
    lost = torch.stack([lost for *_, lost in parts]).sum(dim=0)
    salient = select_salient(lost if weights is None else lost * weights.each, salient_channels)
    return salient, {start: fit for start, fit, _ in parts}
