"""Codes that make up for each other's errors, under the second moments of a layer's inputs.

Rounding each element to its nearest level ignores that errors of correlated channels add up or cancel. Two passes over
the channels look at that, with steps fixed:

* **error feedback** (GPTQ, arXiv 2210.17323, algorithm 1): channel after channel is rounded, and the channels still to
  come take up what the layer's output lost, in the least-squares sense;
* **coordinate descent**: channel after channel takes the level at which the row's error ``e C eᵀ`` is least, while all
  others stay as they are. It never loses, and finds what feedback, which cannot look back, left.

Codes that compensate want larger steps than codes that are nearest: by a third at one bit, by two hundredths at two
(``docs/quality.md``). Kept at the steps of nearest codes, one-bit codes lose more by feedback than they gain, so the
steps are fitted again after each pass, in closed form.

Memory: feedback holds four float32 ``[n, n]`` beside the covariance while it inverts it, 0.82 GB each for the widest
linear of Mistral-7B (``n`` 14336); all else is of the linear's own shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meswitch_kernels import round_in_turn

from .covariance import fit_column_steps, fitted_step, refit_step, row_gain
from .levels import divisor

__all__ = ["compensate", "descend", "feedback"]

#: Channels whose effect on later blocks is applied at once.
_BLOCK = 128
#: Rounds of coordinate descent. The first takes most of what there is to gain, the third next to nothing.
_SWEEPS = 2
#: Share of its mean that feedback adds to the covariance's diagonal; more where that is not enough to factor it.
_DAMPING = 0.01


def compensate(
    delta: Tensor, bits: int, covariance: Tensor, levels: Tensor, step: Tensor, column_step: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels and steps that lose less of the layer's output than those given, and never more.

    Args:
        delta: float32 ``[out, n]``.
        bits: bits of one code, 1 to 4.
        covariance: float32 ``[n, n]``, symmetric and positive semidefinite: ``E[x xᵀ]`` of the layer's inputs.
        levels: float32 ``[out, n]``, in units of the steps: where to start from.
        step: float32 ``[out]``, zero or more.
        column_step: float32 ``[n]``, zero or more.

    Returns:
        Levels, step and column step, shaped as given.

    >>> correlated = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> nearest = torch.tensor([[0.5, 0.5]])  # both too large by 0.2: their errors add up
    >>> compensate(torch.tensor([[0.3, 0.3]]), 2, correlated, nearest, torch.tensor([1.0]))[1].item() < 1
    True
    """

    # Rows are scaled to a peak of one: squares of deltas near 1e-20 would underflow.
    peak = divisor(delta.abs().amax(dim=1))
    delta, step = delta / peak[:, None], step / peak

    def in_steps(levels: Tensor) -> Tensor:
        return levels if column_step is None else levels * column_step

    fed = feedback(delta, bits, covariance, step, column_step)
    fed_step, fed_gain = fitted_step(delta, in_steps(fed), covariance, step)
    better = fed_gain > row_gain(delta, in_steps(levels), covariance, step)
    levels = torch.where(better[:, None], fed, levels)
    step = torch.where(better, fed_step, step)
    for _ in range(_SWEEPS):
        levels = descend(delta, bits, covariance, levels, step, column_step)
        if column_step is not None:
            column_step = fit_column_steps(delta, levels, covariance, step, column_step)
        step = refit_step(delta, in_steps(levels), covariance, step)
    return levels, step * peak, column_step


def feedback(delta: Tensor, bits: int, covariance: Tensor, step: Tensor, column_step: Tensor | None = None) -> Tensor:
    """Levels rounded channel after channel, in the order of falling energy, each error passed on to those behind.

    Args:
        delta: float32 ``[out, n]``.
        bits: bits of one code, 1 to 4.
        covariance: float32 ``[n, n]``.
        step: float32 ``[out]``.
        column_step: float32 ``[n]``.

    Returns:
        float32 ``[out, n]``, in units of the steps.

    >>> feedback(torch.tensor([[0.6, 0.2]]), 2, torch.eye(2), torch.ones(1)).tolist()
    [[0.5, 0.5]]
    """
    order = covariance.diagonal().argsort(descending=True, stable=True)
    # Row k, over its diagonal: by how much each later channel moves for an error of one in channel k.
    spread = _inverse_factor(covariance[order][:, order])
    spread /= spread.diagonal().clone()[:, None]
    spread.neg_().fill_diagonal_(0)
    columns = None if column_step is None else column_step[order]
    values, levels = delta[:, order], torch.empty_like(delta)
    for start in range(0, len(order), _BLOCK):
        block = slice(start, start + _BLOCK)
        chosen, change = round_in_turn(
            values[:, block], step, spread[block, block], bits, column_step=None if columns is None else columns[block]
        )
        levels[:, order[block]] = chosen
        values[:, block.stop :].addmm_(change, spread[block, block.stop :])
    return levels


def _inverse_factor(covariance: Tensor) -> Tensor:
    """Upper triangular ``U`` with ``Uᵀ U`` the inverse of the damped covariance."""
    mean = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    added = _DAMPING
    while True:
        damped = covariance.clone()
        damped.diagonal().add_(added * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped  # each of these matrices takes as much as all moments of a layer
        if not bool(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        # The damped identity can always be factored, and enough of it makes this that.
        if not bool(failed) or added > 1 / torch.finfo(torch.float32).eps:
            return factor
        added *= 10


def descend(
    delta: Tensor,
    bits: int,
    covariance: Tensor,
    levels: Tensor,
    step: Tensor,
    column_step: Tensor | None = None,
) -> Tensor:
    """Levels after every channel took the best one in turn, all others being what they are.

    A row's error ``e C eᵀ`` is a parabola in one of its elements, with its minimum at ``e_i - (e C)_i / C_ii``; of the
    levels, the nearest to it is the best.

    Args:
        delta: float32 ``[out, n]``.
        bits: bits of one code, 1 to 4.
        covariance: float32 ``[n, n]``.
        levels: float32 ``[out, n]``: where to start from.
        step: float32 ``[out]``.
        column_step: float32 ``[n]``.

    Returns:
        float32 ``[out, n]``, in units of the steps.

    >>> correlated = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> descend(torch.tensor([[0.9, 0.9]]), 2, correlated, torch.tensor([[0.5, 0.5]]), torch.ones(1)).tolist()
    [[1.5, 0.5]]
    """
    approximation = levels * step[:, None]
    if column_step is not None:
        approximation = approximation * column_step
    pull = (delta - approximation) @ covariance
    energy = covariance.diagonal()
    curvature = torch.where(energy > 0, energy, torch.ones_like(energy))
    found = torch.empty_like(levels)
    for start in range(0, delta.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        before = approximation[:, block]
        found[:, block], change = round_in_turn(
            before + pull[:, block] / curvature[block],
            step,
            (covariance[block, block] / curvature[block]).triu_(1),
            bits,
            column_step=None if column_step is None else column_step[block],
            start=before,
        )
        pull.addmm_(change, covariance[block])
    return found
