"""Spending bytes where they buy most: one option for each item, for the least loss together.

The problem is a multiple-choice knapsack. Options that lie above the lower convex hull of an item's (size, loss)
points are never worth their bytes while others can be had for less; on the hulls, taking steps in the order of what
they save a byte gives the optimum for every budget that it comes by (Everett, "Generalized Lagrange Multiplier Method
for Solving Problems of Optimum Allocation of Resources", 1963). In between, the loss is above the optimum by no more
than what the next step would have saved; what is left of the budget is spent on whatever still fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Option", "allocate", "allocate_to_loss", "total"]


class Option(NamedTuple):
    """What an item may be.

    Attributes:
        size: what it takes of the budget, in bytes.
        loss: what it loses, zero or more, in the same unit for all items.
    """

    size: int
    loss: float


class _Step(NamedTuple):
    """From one point of an item's hull to the next."""

    rate: float
    item: int
    option: int
    size: int


def total(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> Option:
    """Size and loss of a choice.

    >>> total([[Option(1, 0.5)], [Option(1, 2.0), Option(3, 1.0)]], [0, 1])
    Option(size=4, loss=1.5)
    """
    chosen = [of_item[i] for of_item, i in zip(options, choice, strict=True)]
    return Option(sum(option.size for option in chosen), math.fsum(option.loss for option in chosen))


def allocate(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The choice of little loss whose size is within a budget; the optimum where no part of the budget is left over.

    A larger budget never gives a greater loss.

    Args:
        options: for each item what it may be, one option at least.
        budget: bytes.

    Returns:
        For each item the index of its option.

    Raises:
        ValueError: the smallest options together take more than the budget.

    >>> flat, steep = [Option(1, 3.0), Option(2, 2.9)], [Option(1, 9.0), Option(2, 2.0)]
    >>> allocate([flat, steep], budget=3)
    [0, 1]
    """
    hulls = [_hull(of_item) for of_item in options]
    choice = [hull[0] for hull in hulls]
    left = budget - total(options, choice).size
    if left < 0:
        raise ValueError(f"the smallest options take {budget - left}, more than the budget of {budget}")
    for step in _steps(options, hulls):
        if step.size > left:
            break
        choice[step.item] = step.option
        left -= step.size
    while (best := _best_that_fits(options, choice, left)) is not None:
        choice[best.item] = best.option
        left -= best.size
    return choice


def allocate_to_loss(options: Sequence[Sequence[Option]], limit: float) -> list[int]:
    """The small choice whose loss is within a limit; the one of least loss where there is none.

    Args:
        options: as for :func:`allocate`.
        limit: of the sum of losses.

    >>> allocate_to_loss([[Option(1, 3.0), Option(2, 2.9)], [Option(1, 9.0), Option(2, 2.0)]], limit=5.0)
    [0, 1]
    """
    hulls = [_hull(of_item) for of_item in options]
    choice = [hull[0] for hull in hulls]
    for step in _steps(options, hulls):
        if total(options, choice).loss <= limit:
            break
        choice[step.item] = step.option
    return choice


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull, from the smallest option to the one of least loss."""
    hull: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: options[i]):
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _rate(options[hull[-2]], options[hull[-1]]) <= _rate(options[hull[-1]], options[i]):
            hull.pop()
        hull.append(i)
    return hull


def _steps(options: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[_Step]:
    """The steps of all hulls, those that save most a byte first; those of one item stay in order."""
    steps = [
        _Step(_rate(of_item[one], of_item[other]), item, other, of_item[other].size - of_item[one].size)
        for item, (of_item, hull) in enumerate(zip(options, hulls, strict=True))
        for one, other in pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step.rate)


def _best_that_fits(options: Sequence[Sequence[Option]], choice: Sequence[int], left: int) -> _Step | None:
    """The change of one item that saves most a byte among those that take no more than ``left``."""
    best: _Step | None = None
    for item, of_item in enumerate(options):
        now = of_item[choice[item]]
        for i, option in enumerate(of_item):
            size = option.size - now.size
            if 0 < size <= left and option.loss < now.loss:
                rate = _rate(now, option)
                if best is None or rate > best.rate:
                    best = _Step(rate, item, i, size)
    return best


def _rate(one: Option, other: Option) -> float:
    return (one.loss - other.loss) / (other.size - one.size)
