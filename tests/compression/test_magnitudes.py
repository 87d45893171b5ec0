"""Histograms of magnitudes and the steps found in them, against numpy and the best of many exact steps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_meswitch.compression.magnitudes import bins, count_magnitudes, exact_weights, octave, searched_step
from transformers_meswitch.compression.step_size import fit_step


def rows_of(kind, n=2048, rows=16):
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(rows, n, generator=generator)
    if kind == "heavy":
        return normal**3
    if kind == "outlier":
        normal[:, 3] = 60
        return normal
    if kind == "sparse":
        return normal * (torch.rand(rows, n, generator=generator) < 0.3)
    if kind == "bfloat16":  # few distinct values, as a short fine-tuning leaves
        base = 0.02 * normal
        moved = base + 0.0005 * torch.randn(rows, n, generator=generator)
        return moved.bfloat16().float() - base.bfloat16().float()
    return normal


def row_errors(delta, step, bits, weight):
    levels = np.clip(np.floor(delta / step[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
    return ((delta - levels * step[:, None]) ** 2) @ weight


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "heavy", "outlier", "sparse", "bfloat16"])
def test_no_exact_step_of_a_fine_grid_is_much_better(kind, bits, weighted):
    """Of the squared error over all rows, 0.1 % at most; a step that is a fifth off loses more."""
    delta = rows_of(kind)
    moment = torch.rand(delta.shape[1], generator=torch.Generator().manual_seed(1)) ** 2 if weighted else None
    weight = np.ones(delta.shape[1]) if moment is None else moment.double().numpy()
    exact, step = delta.double().numpy(), fit_step(delta, bits, moment).double().numpy()
    grid = [row_errors(exact, 1.01**i * np.sqrt((exact**2).mean(1)), bits, weight) for i in range(-330, 100)]
    best = np.min(grid, axis=0).sum()
    assert row_errors(exact, step, bits, weight).sum() < 1.001 * best
    assert row_errors(exact, 1.2 * step, bits, weight).sum() > 1.001 * best


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 70), st.floats(-20, 20))
def test_counts_are_those_of_numpy_and_add_up(seed, bits, n, exponent):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(3, n, generator=generator) * 2.0**exponent
    delta[1] *= 1e-3
    delta[2] = 0
    top = octave(delta.abs().amax(dim=1))
    counts = count_magnitudes(delta, top, bits)
    assert counts.shape == (3, bins(bits))
    assert counts.sum(dim=1).tolist() == [n] * 3
    assert counts[2, -1] == n
    # Bins are as wide as their magnitude's share: 16 an octave or more, the nearest taken.
    per_octave = (bins(bits) - 1) // 16
    for j in range(2):
        relative = delta[j].abs().double().numpy() / 2.0 ** (int(top[j]) - 126)
        power = np.floor(np.log2(np.maximum(relative, 1e-30)))
        place = power * per_octave + np.floor((relative / 2**power - 1) * per_octave + 0.5)
        expected = np.bincount(np.clip(-place, 0, bins(bits) - 1).astype(int), minlength=bins(bits))
        assert counts[j].tolist() == expected.tolist()


def test_weighted_counts_do_not_depend_on_the_order():
    delta = rows_of("normal", n=501, rows=4)
    weight = exact_weights(torch.rand(501, generator=torch.Generator().manual_seed(2)) ** 8)
    order = torch.randperm(501, generator=torch.Generator().manual_seed(3))
    top = octave(delta.abs().amax(dim=1))
    one, other = (count_magnitudes(delta[:, i].contiguous(), top, 2, weight[i]) for i in (torch.arange(501), order))
    assert torch.equal(one, other)
    assert torch.equal(one.sum(dim=1), weight.sum().expand(4))
    # What leaves the row can be taken out of its histogram without a trace.
    rest, gone = (count_magnitudes(delta[:, i].contiguous(), top, 2, weight[i]) for i in (order[:480], order[480:]))
    assert torch.equal(one - gone, rest)


def test_a_step_of_equal_magnitudes_is_exact():
    row = torch.tensor([[3.0, -3.0, 3.0, -3.0]])
    top = octave(row.abs().amax(dim=1))
    assert searched_step(count_magnitudes(row, top, 2), top, 2).item() in (2.0, 6.0)
    top = octave(torch.zeros(1))
    assert searched_step(count_magnitudes(0 * row, top, 2), top, 2).item() == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_not_finite_rows_raise_nothing_here(bits):
    row = torch.tensor([[torch.nan, 1.0], [torch.inf, -torch.inf], [1.0, 2.0]])
    top = octave(row.abs().amax(dim=1))
    counts = count_magnitudes(row, top, bits)
    assert counts.sum(dim=1).tolist() == [2, 2, 2]
    assert top.tolist()[:2] == [255, 255]
