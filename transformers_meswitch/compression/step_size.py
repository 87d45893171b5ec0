"""The step size of each row: the one that loses least of the layer's output.

For row ``j`` with delta ``d``, levels ``q`` and input second moments ``h`` (the diagonal of ``E[x xᵀ]``) the lost
output is ``sum_i h_i (d_i - s q_i)²``. Given the levels, its minimum is in closed form, ``s = sum h d q / sum h q²``;
given the step, the nearest levels are best. A histogram of the row's magnitudes tells the step to begin with (see
:mod:`.magnitudes`), and the exact closed form for the levels that it gives never raises the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import over_blocks
from .levels import divisor, nearest_levels
from .magnitudes import count_magnitudes, exact_weights, is_coarse, octave, searched_step

__all__ = ["RowFit", "Weights", "fit_row_column_steps", "fit_rows", "fit_step"]

#: The alternation of rows and columns ends at this relative gain; the rounds bound it where gains stay small.
_JOINT_GAIN = 1e-4
_ROUNDS = 32


@dataclass(frozen=True)
class Weights:
    """What an error of each channel weighs.

    Attributes:
        each: float32 ``[n]``, from zero to one.
        whole: float64 ``[n]``, the same as whole numbers, see :func:`.magnitudes.exact_weights`.
    """

    each: Tensor
    whole: Tensor

    @classmethod
    def of(cls, second_moment: Tensor | None, device: torch.device) -> Weights | None:
        """Second moments scaled to a maximum of one; `None` where there are none or all are zero.

        Args:
            second_moment: float32 ``[n]``, zero or more.
            device: where the weights are to be.
        """
        if second_moment is None or not bool((second_moment > 0).any()):
            return None
        moment = second_moment.to(device=device, dtype=torch.float32)
        each = moment / moment.max()
        return cls(each, exact_weights(each))

    def at(self, channels: Tensor) -> Weights:
        """Those of some channels, int64 ``[k]``."""
        return Weights(self.each[channels], self.whole[channels])


@dataclass(frozen=True)
class RowFit:
    """The steps of some rows, and what they came of.

    Attributes:
        step: float32 ``[rows]``; zero for a row of zeros.
        counts: their histograms, ``[rows, bins]``, see :func:`.magnitudes.count_magnitudes`.
        top: int32 ``[rows]``, the octaves that they were counted with.
    """

    step: Tensor
    counts: Tensor
    top: Tensor


def fit_rows(
    delta: Tensor,
    bits: int,
    weights: Weights | None,
    counted: tuple[Tensor, Tensor] | None = None,
    settle: bool = True,
) -> RowFit:
    """Step sizes of a block of rows.

    Args:
        delta: float32 ``[rows, n]``, contiguous; a row that is not finite gets a step that means nothing.
        bits: bits of one code, 1 to 4.
        weights: of the channels; `None` weighs all alike.
        counted: histograms of these rows and the octaves they were counted with, if they are known already.
        settle: whether to end with the exact closed form; what the search finds is within a percent of it.
    """
    counts, top = counted if counted is not None else _count(delta, bits, weights)
    if counted is not None and is_coarse(counts, bits):
        counts, top = _count(delta, bits, weights)
    step = searched_step(counts, top, bits)
    if settle:
        scaled = delta / divisor(step)[:, None]
        level = nearest_levels(scaled, bits)
        product, square = scaled.mul_(level), level.square_()
        if weights is None:
            step = step * (product.sum(dim=1) / square.sum(dim=1))
        else:
            step = step * ((product @ weights.each) / (square @ weights.each))
    return RowFit(step.nan_to_num_(), counts, top)


def _count(delta: Tensor, bits: int, weights: Weights | None) -> tuple[Tensor, Tensor]:
    peak = delta.abs().amax(dim=1) if delta.shape[1] else delta.new_zeros(len(delta))
    top = octave(peak)
    return count_magnitudes(delta, top, bits, None if weights is None else weights.whole), top


def fit_step(delta: Tensor, bits: int, second_moment: Tensor | None = None) -> Tensor:
    """Step size of each row.

    Args:
        delta: float32 ``[out, n]``, finite.
        bits: bits of one code, 1 to 4.
        second_moment: float32 ``[n]``, zero or more: mean square of each input channel; `None` weighs all alike.

    Returns:
        float32 ``[out]``; zero for a row of zeros.

    >>> fit_step(torch.tensor([[0.5, -0.5, 1.5, -1.5], [0.0, 0.0, 0.0, 0.0]]), bits=2).tolist()
    [1.0, 0.0]
    """
    if not delta.numel():
        return delta.new_zeros(len(delta), dtype=torch.float32)
    weights = Weights.of(second_moment, delta.device)

    def work(start: int, stop: int) -> Tensor:
        return fit_rows(delta[start:stop].contiguous(), bits, weights).step

    return torch.cat(over_blocks(work, delta.shape, delta.device))


def fit_row_column_steps(delta: Tensor, bits: int, second_moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Step size of each row and a factor on it for each column, so that level * row step * column step is nearest.

    Rows and columns are fitted in turns, each in closed form with the other fixed; the error never rises and ends no
    higher than that of :func:`fit_step`.

    Args:
        delta: float32 ``[out, n]``, finite.
        bits: bits of one code, 1 to 4.
        second_moment: float32 ``[n]``, zero or more: mean square of each input channel; `None` weighs all alike.

    Returns:
        float32 ``[out]`` and float32 ``[n]``; zero for a row or column of zeros.

    >>> steps = fit_row_column_steps(torch.tensor([[1.0, -2.0], [-3.0, 6.0]]), bits=1)
    >>> (steps[0][:, None] * steps[1] / 2).tolist()  # at 1 bit, a half step is the magnitude
    [[1.0, 2.0], [3.0, 6.0]]
    """
    out, channels = delta.shape
    if channels == 0 or out == 0:
        return delta.new_zeros(out, dtype=torch.float32), delta.new_zeros(channels, dtype=torch.float32)
    weights = Weights.of(second_moment, delta.device)
    weight = delta.new_ones(channels, dtype=torch.float32) if weights is None else weights.each
    magnitude = delta.square().mean(dim=0).sqrt()
    flat = torch.where(magnitude > 0, torch.ones_like(magnitude), torch.zeros_like(magnitude))
    fits = [_alternate(delta, bits, weight, start) for start in (flat, magnitude / magnitude.max().clamp_min(1e-38))]
    _, row, column = min(fits, key=lambda fit: fit[0])
    return row, column


def _alternate(delta: Tensor, bits: int, weight: Tensor, column: Tensor) -> tuple[float, Tensor, Tensor]:
    """Fit from one start; returns the weighted error, row steps and column steps."""
    row = _rows_given(delta, bits, weight, column)
    error = _joint_error(delta, bits, weight, row, column)
    for _ in range(_ROUNDS):
        next_column = _refit_columns(delta, bits, row, column)
        next_row = _refit_rows(delta, bits, weight, row, next_column)
        next_error = _joint_error(delta, bits, weight, next_row, next_column)
        if not next_error < error:
            break
        gain = (error - next_error) / error
        row, column, error = next_row, next_column, next_error
        if gain < _JOINT_GAIN:
            break
    return error, row, column


def _rows_given(delta: Tensor, bits: int, weight: Tensor, column: Tensor) -> Tensor:
    """Row steps for fixed column steps: the plain fit on ``delta / column``, whose errors weigh ``column²`` more."""
    live = column > 0
    if not bool(live.any()):
        return delta.new_zeros(delta.shape[0], dtype=torch.float32)
    return fit_step(delta[:, live] / column[live], bits, weight[live] * column[live].square())


def _refit_rows(delta: Tensor, bits: int, weight: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Row steps for fixed column steps and the levels that both give, in closed form."""

    def optimum(d: Tensor, r: Tensor) -> Tensor:
        level = _levels(d, bits, r, column) * column
        square = level.square() @ weight
        return torch.where((square > 0) & (r > 0), ((d * level) @ weight) / divisor(square), torch.zeros_like(r))

    blocks = over_blocks(lambda i, j: optimum(delta[i:j], row[i:j]), delta.shape, delta.device)
    return torch.cat(blocks)


def _levels(delta: Tensor, bits: int, row: Tensor, column: Tensor) -> Tensor:
    return nearest_levels(delta / divisor(row)[:, None] / divisor(column), bits)


def _sum_over_rows(delta: Tensor, row: Tensor, part: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum of ``part`` over blocks of rows."""
    parts = over_blocks(lambda i, j: part(delta[i:j], row[i:j]), delta.shape, delta.device)
    return torch.stack(parts).sum(dim=0)


def _refit_columns(delta: Tensor, bits: int, row: Tensor, column: Tensor) -> Tensor:
    """Column steps for fixed row steps and the levels that both give: ``sum_j d q / sum_j q²``, ``q`` in row steps."""

    def moments(d: Tensor, r: Tensor) -> Tensor:
        level = _levels(d, bits, r, column) * r[:, None]
        return torch.stack([(d * level).sum(dim=0), level.square().sum(dim=0)])

    product, square = _sum_over_rows(delta, row, moments)
    return torch.where((square > 0) & (column > 0), product / divisor(square), torch.zeros_like(column))


def _joint_error(delta: Tensor, bits: int, weight: Tensor, row: Tensor, column: Tensor) -> float:
    def error(d: Tensor, r: Tensor) -> Tensor:
        lost = (d - _levels(d, bits, r, column) * r[:, None] * column).square() @ weight
        return lost.sum()

    return float(_sum_over_rows(delta, row, error))
