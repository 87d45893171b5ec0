"""Spending a budget, against every choice there is."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_meswitch.compression.budget import Option, allocate, allocate_to_loss, total

SIZES = st.integers(0, 30)
LOSSES = st.integers(0, 1000).map(lambda n: n / 8)  # sums of eighths are exact
ITEMS = st.lists(st.lists(st.builds(Option, SIZES, LOSSES), min_size=1, max_size=5), min_size=1, max_size=4)


def by_trying(options, budget):
    """The least loss of all choices within the budget; `None` if there is none."""
    sums = [total(options, choice) for choice in product(*(range(len(item)) for item in options))]
    return min((found.loss for found in sums if found.size <= budget), default=None)


def hull_losses(options):
    """Losses that steps on a hull save at most, by the definition: points below all chords."""
    gains = [0.0]
    for item in options:
        losses = sorted({option.loss for option in item}, reverse=True)
        gains += [losses[0] - losses[-1]]
    return max(gains)


@given(ITEMS, st.integers(0, 130))
def test_never_over_the_budget_and_near_the_optimum(options, budget):
    best = by_trying(options, budget)
    if best is None:
        with pytest.raises(ValueError, match="more than the budget"):
            allocate(options, budget)
        return
    found = total(options, allocate(options, budget))
    assert found.size <= budget
    # By no more than what one item can save at all.
    assert best <= found.loss <= best + hull_losses(options)


@given(ITEMS, st.integers(0, 130), st.integers(0, 20))
def test_a_larger_budget_never_loses_more(options, budget, more):
    if by_trying(options, budget) is not None:
        one, other = (total(options, allocate(options, b)) for b in (budget, budget + more))
        assert other.loss <= one.loss


@given(ITEMS, LOSSES)
def test_the_optimum_at_the_corners_of_the_hulls(options, limit):
    """Whatever limit of loss leads to, no choice of its size loses less."""
    found = total(options, allocate_to_loss(options, limit))
    assert found.loss == by_trying(options, found.size)
    assert total(options, allocate(options, found.size)).loss == found.loss
    least = sum(min(option.loss for option in item) for item in options)
    assert found.loss <= limit or found.loss == least


@given(ITEMS)
def test_with_all_the_budget_there_is_the_least_loss(options):
    found = total(options, allocate(options, sum(max(option.size for option in item) for item in options)))
    assert found.loss == sum(min(option.loss for option in item) for item in options)


def test_what_is_left_over_is_spent():
    large, small = [Option(1, 9.0), Option(10, 0.0)], [Option(1, 0.5), Option(3, 0.25)]
    assert allocate([large, small], 9) == [0, 1]
    assert allocate([large, small], 11) == [1, 0]


def test_the_check_notices_a_choice_that_wastes_the_budget():
    options = [[Option(1, 9.0), Option(2, 0.0)], [Option(1, 1.0), Option(2, 0.0)]]
    wrong = [0, 1]
    assert total(options, wrong).loss > by_trying(options, 3) == total(options, allocate(options, 3)).loss
