"""Fitting a quantised delta to the whole second-moment matrix of a layer's inputs, not to its diagonal alone.

A layer with inputs ``x`` and weight error ``e`` (of one row) loses the output ``e·x``; the mean of its square is
``e C eᵀ`` with ``C = E[x xᵀ]``. Channels of real layers are strongly correlated, so errors that look alike channel by
channel may cancel or add up. Two parts of a delta can be fitted to ``C`` in closed form once the levels are chosen:

* the step size of row ``j`` with delta ``d`` and levels ``q``: ``s = d C qᵀ / q C qᵀ``;
* the salient columns ``S``, which are not quantised and can therefore take up what the codes of the channels ``K``
  lose along them: the least squares of ``(d - s q)_K x_K + (d - v)_S x_S`` over ``v`` is
  ``v = d_S + e_K C_KS C_SS⁻¹`` with ``e_K = (d - s q)_K``. What is left is the loss under the Schur complement
  ``C_KK - C_KS C_SS⁻¹ C_SK``, so fitting the steps to that is fitting both at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .levels import divisor, nearest_levels

__all__ = [
    "Absorption",
    "fit_column_steps",
    "fit_levels_and_step",
    "fitted_step",
    "refit_step",
    "row_gain",
    "salient_absorption",
]

#: The alternation stops when no row gains this share of its error, at the latest after so many rounds.
_GAIN = 1e-3
_ROUNDS = 10
#: Share of itself added to each element of a diagonal that is solved with: the sample's covariance is of limited rank.
_DAMPING = 0.01


def fit_levels_and_step(
    delta: Tensor, bits: int, covariance: Tensor, step: Tensor, column_step: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Levels and row steps that lose least of the layer's output, from the steps of a fit to the diagonal.

    The closed form for the step and the nearest levels at that step take turns. Rounding to the nearest does not look
    at the other channels, so a turn may lose; each row keeps the best pair that it met, and never ends above its
    start.

    Args:
        delta: float32 ``[out, n]``.
        bits: bits of one code, 1 to 4.
        covariance: float32 ``[n, n]``, symmetric and positive semidefinite: ``E[x xᵀ]`` of the layer's inputs.
        step: float32 ``[out]``, zero or more: where to start from.
        column_step: float32 ``[n]``, zero or more: fixed factors on the levels of each column.

    Returns:
        Levels float32 ``[out, n]`` in units of the step sizes, and step sizes float32 ``[out]``; the delta is
        approximated by ``levels * step[:, None] * column_step``.

    >>> correlated = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> levels, step = fit_levels_and_step(torch.tensor([[1.0, 0.6]]), 1, correlated, torch.tensor([1.6]))
    >>> levels.tolist(), round(step.item(), 4)
    ([[0.5, 0.5]], 1.6)
    """
    # Rows are scaled to a peak of one: squares of deltas near 1e-20 would underflow.
    peak = divisor(delta.abs().amax(dim=1))
    delta, step = delta / peak[:, None], step / peak
    energy = ((delta @ covariance) * delta).sum(dim=1)
    best_gain = torch.full_like(energy, -torch.inf)
    best_step, best_levels = step, torch.empty_like(delta)
    current = step
    for _ in range(_ROUNDS):
        scale = divisor(current)[:, None] if column_step is None else divisor(current)[:, None] * divisor(column_step)
        levels = nearest_levels(delta / scale, bits)
        effective = levels if column_step is None else levels * column_step
        optimum, gain = fitted_step(delta, effective, covariance, current)
        better = gain > best_gain
        worthwhile = bool((gain > best_gain + _GAIN * (energy - gain).clamp_min(0)).any())
        best_gain = torch.where(better, gain, best_gain)
        best_step = torch.where(better, optimum, best_step)
        best_levels = torch.where(better[:, None], levels, best_levels)
        if not worthwhile or bits == 1:
            # At one bit the levels are the signs whatever the step, so the first closed form is the last.
            break
        current = optimum
    return best_levels, best_step * peak


def refit_step(delta: Tensor, levels: Tensor, covariance: Tensor, step: Tensor) -> Tensor:
    """The row steps that lose least of the layer's output for given levels, in closed form.

    Args:
        delta: float32 ``[out, n]``.
        levels: float32 ``[out, n]``, times the column steps if there are some.
        covariance: float32 ``[n, n]``.
        step: float32 ``[out]``: kept where no positive step is better than none.

    Returns:
        float32 ``[out]``; zero where ``step`` is.

    >>> refit_step(torch.tensor([[1.0, -3.0]]), torch.tensor([[0.5, -0.5]]), torch.eye(2), torch.ones(1)).tolist()
    [4.0]
    """
    return fitted_step(delta, levels, covariance, step)[0]


def fitted_step(delta: Tensor, levels: Tensor, covariance: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`refit_step` gives, and what :func:`row_gain` gives at it.

    >>> step, gain = fitted_step(torch.tensor([[3.0]]), torch.tensor([[0.5]]), torch.eye(1), torch.ones(1))
    >>> step.item(), gain.item()
    (6.0, 9.0)
    """
    product, square = _products(delta, levels, covariance)
    optimum = _optimum(product, square, step)
    return optimum, _gain(product, square, optimum)


def _products(delta: Tensor, levels: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """``d C qᵀ`` and ``q C qᵀ`` of each row."""
    projected = levels @ covariance
    return (delta * projected).sum(dim=1), (levels * projected).sum(dim=1)


def row_gain(delta: Tensor, levels: Tensor, covariance: Tensor, step: Tensor) -> Tensor:
    """How much less than all of its energy ``d C dᵀ`` each row loses at given levels and steps.

    Args:
        delta: float32 ``[out, n]``.
        levels: float32 ``[out, n]``, times the column steps if there are some.
        covariance: float32 ``[n, n]``.
        step: float32 ``[out]``.

    Returns:
        float32 ``[out]``; negative where the row would better be left out.

    >>> row_gain(torch.tensor([[3.0]]), torch.tensor([[0.5]]), torch.eye(1), torch.tensor([4.0])).item()
    8.0
    """
    return _gain(*_products(delta, levels, covariance), step)


def _gain(product: Tensor, square: Tensor, step: Tensor) -> Tensor:
    return step * (2 * product - step * square)


def _optimum(product: Tensor, square: Tensor, step: Tensor) -> Tensor:
    return torch.where((product > 0) & (square > 0) & (step > 0), product / divisor(square), step)


def fit_column_steps(delta: Tensor, levels: Tensor, covariance: Tensor, step: Tensor, column_step: Tensor) -> Tensor:
    """Column steps that lose least of the layer's output, given levels and row steps: a linear least squares.

    The loss of all rows together is quadratic in the column steps ``c``. With ``q_j`` the levels of row ``j`` times
    its step, its minimum solves ``A c = b`` with ``A = C ∘ Σ_j q_jᵀ q_j`` and ``b = Σ_j q_j ∘ (d_j C)``.

    Args:
        delta: float32 ``[out, n]``.
        levels: float32 ``[out, n]``.
        covariance: float32 ``[n, n]``.
        step: float32 ``[out]``.
        column_step: float32 ``[n]``: where to start from; the solution is damped towards it.

    Returns:
        float32 ``[n]``; zero where ``column_step`` is.

    >>> fit_column_steps(torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, -0.5]]), torch.eye(2), torch.ones(1),
    ...     torch.tensor([4.0, 6.0])).tolist()
    [4.0, 6.0]
    """
    live = (column_step > 0).nonzero().squeeze(1)
    if not len(live):
        return column_step
    scaled = (levels * step[:, None])[:, live]
    system = covariance[live][:, live] * (scaled.T @ scaled)
    target = (scaled * (delta @ covariance)[:, live]).sum(dim=0)
    damping = _damp(system)
    fitted = torch.zeros_like(column_step)
    fitted[live] = torch.linalg.solve(system, target + damping * column_step[live])
    return fitted


def _damp(system: Tensor) -> Tensor:
    """Add to a diagonal in place and return what was added; a dead channel stands alone, with a divisor of one."""
    diagonal = system.diagonal()
    added = torch.where(diagonal > 0, _DAMPING * diagonal, torch.ones_like(diagonal))
    diagonal.add_(added)
    return added


@dataclass(frozen=True)
class Absorption:
    """What salient columns can take up of the coded channels' errors.

    Attributes:
        remaining: float32 ``[n, n]``, the coded channels' second moments that salient columns cannot take up: the
            Schur complement.
        weights: float32 ``[n, k]``: a weight error ``e`` ``[out, n]`` of the coded channels is compensated, as far as
            it can be, by adding ``e @ weights`` to the salient columns.
    """

    remaining: Tensor
    weights: Tensor


def salient_absorption(covariance: Tensor, coded: Tensor, salient: Tensor) -> Absorption:
    """Split a layer's second moments into what its salient columns can compensate and what remains.

    Args:
        covariance: float32 ``[in, in]``.
        coded: int64 ``[n]``, the coded channels.
        salient: int64 ``[k]``, the salient channels; none gives the coded channels' own second moments.

    >>> absorbed = salient_absorption(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([0]), torch.tensor([1]))
    >>> round(absorbed.remaining.item(), 2), round(absorbed.weights.item(), 2)
    (0.01, 0.99)
    """
    among = covariance[coded][:, coded]
    if not len(salient):
        return Absorption(among, covariance.new_zeros(len(coded), 0))
    cross = covariance[coded][:, salient]
    own = covariance[salient][:, salient].clone()
    _damp(own)
    weights = torch.linalg.solve(own, cross.T).T
    return Absorption(among - weights @ cross.T, weights.contiguous())
