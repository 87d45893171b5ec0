"""Step sizes against a brute-force search over scalars in numpy."""

import numpy as np
import pytest
import torch

from transformers_meswitch.compression import blocks
from transformers_meswitch.compression.step_size import fit_row_column_steps, fit_step


def row_error(row, step, bits, weight):
    """Weighted squared error of a row for one step, every element at the nearest of the levels tried in turn."""
    if step == 0:
        return float((weight * row**2).sum())
    levels = (2 * np.arange(2**bits) + 1 - 2**bits) / 2 * step
    return float((weight * np.abs(row[:, None] - levels[None]).min(1) ** 2).sum())


def brute_force(row, bits, weight):
    """The least error over a fine grid of steps."""
    grid = np.linspace(0, 2 * np.abs(row).max(), 4001)
    return min(row_error(row, step, bits, weight) for step in grid)


@pytest.fixture
def delta():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator) * torch.tensor([1.0, 1e-3, 5.0, 1.0, 1.0, 1.0])[:, None]
    rows[3] = rows[3] ** 3  # heavy tails
    rows[4, 7] = 40.0  # one outlier
    rows[5] = rows[5].sign()
    return rows


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_step_is_as_good_as_brute_force(delta, bits, weighted):
    moment = torch.rand(40, generator=torch.Generator().manual_seed(1)) ** 4 * 50 if weighted else None
    weight = np.ones(40) if moment is None else moment.double().numpy()
    step = fit_step(delta, bits, moment)
    assert step.dtype == torch.float32
    # Forty channels of very uneven weight have several minima a row: 1 bit has one, more bits may miss the deepest.
    near = {1: 1.001, 2: 1.03, 3: 1.2, 4: 1.5}[bits]
    for row, found in zip(delta.double().numpy(), step.double().numpy(), strict=True):
        best = brute_force(row, bits, weight)
        rounding = 1e-9 * (weight * row**2).sum()
        assert row_error(row, found, bits, weight) <= best * near + rounding
        assert row_error(row, found * 2.6, bits, weight) > best * near + rounding  # a wrong step would be noticed
        for nudge in (0.995, 1.005):  # at a minimum
            assert row_error(row, found, bits, weight) <= row_error(row, found * nudge, bits, weight) + rounding


@pytest.mark.parametrize(("bits", "near"), [(2, 1.001), (3, 1.005), (4, 1.03)])
def test_step_of_a_wide_row_is_all_but_the_best(bits, near):
    rows = torch.randn(3, 1024, generator=torch.Generator().manual_seed(bits))
    for row, found in zip(rows.double().numpy(), fit_step(rows, bits).double().numpy(), strict=True):
        best = min(row_error(row, step, bits, 1.0) for step in np.linspace(0, 2 * np.abs(row).max(), 801))
        assert row_error(row, found, bits, 1.0) <= best * near
        assert row_error(row, found * 1.1, bits, 1.0) > best * near


def test_one_bit_is_twice_the_mean_magnitude(delta):
    torch.testing.assert_close(fit_step(delta, 1), 2 * delta.abs().mean(1))


def test_weights_move_the_step(delta):
    moment = torch.ones(40)
    moment[:20] = 1000
    assert not torch.allclose(fit_step(delta, 2, moment), fit_step(delta, 2), rtol=1e-3)
    torch.testing.assert_close(fit_step(delta, 2, moment * 1e20), fit_step(delta, 2, moment))
    torch.testing.assert_close(fit_step(delta, 2, moment * 0), fit_step(delta, 2))


def test_zero_rows_and_empty_rows_have_step_zero():
    assert fit_step(torch.zeros(2, 5), 2).tolist() == [0.0, 0.0]
    assert fit_step(torch.zeros(3, 0), 2).tolist() == [0.0, 0.0, 0.0]
    row, column = fit_row_column_steps(torch.zeros(2, 5), 2)
    assert (row.tolist(), column.tolist()) == ([0.0] * 2, [0.0] * 5)
    row, column = fit_row_column_steps(torch.zeros(2, 0), 2)
    assert (row.tolist(), column.tolist()) == ([0.0] * 2, [])


@pytest.mark.parametrize("exponent", [-83, -40, 40, 60])
def test_scale_is_no_matter(delta, exponent):
    scale = 2.0**exponent
    torch.testing.assert_close(fit_step(delta * scale, 3) / scale, fit_step(delta, 3), rtol=1e-4, atol=0)


def test_blocks_of_rows_change_nothing(delta, monkeypatch):
    whole = fit_step(delta, 2), *fit_row_column_steps(delta, 2)
    monkeypatch.setattr(blocks, "_BLOCK", {"cpu": 80})
    parts = fit_step(delta, 2), *fit_row_column_steps(delta, 2)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def matrix_error(delta, row, column, bits, weight):
    return sum(
        row_error_columns(delta[j].double().numpy(), float(row[j]) * column.double().numpy(), bits, weight)
        for j in range(len(delta))
    )


def row_error_columns(row, steps, bits, weight):
    levels = (2 * np.arange(2**bits) + 1 - 2**bits) / 2
    return float((weight * np.abs(row[:, None] - steps[:, None] * levels).min(1) ** 2).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_column_steps_never_lose_and_recover_a_product(bits, weighted):
    generator = torch.Generator().manual_seed(bits)
    columns = torch.rand(24, generator=generator) * 3 + 0.05
    columns[3] = 0
    delta = torch.randn(16, 24, generator=generator) * columns
    moment = torch.rand(24, generator=generator) if weighted else None
    weight = np.ones(24) if moment is None else moment.double().numpy()
    row, column = fit_row_column_steps(delta, bits, moment)
    assert bool((row >= 0).all())
    assert bool((column >= 0).all())
    joint = matrix_error(delta, row, column, bits, weight)
    plain = matrix_error(delta, fit_step(delta, bits, moment), torch.ones(24), bits, weight)
    assert joint < 0.95 * plain
    assert column[3] == 0


def test_a_rank_one_magnitude_is_exact_at_one_bit():
    generator = torch.Generator().manual_seed(3)
    magnitude = (torch.rand(8, generator=generator) + 0.1)[:, None] * (torch.rand(12, generator=generator) + 0.1)
    delta = magnitude * torch.randn(8, 12, generator=generator).sign()
    row, column = fit_row_column_steps(delta, 1)
    torch.testing.assert_close(row[:, None] * column / 2, magnitude, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_joint_fit_is_at_a_minimum(bits):
    generator = torch.Generator().manual_seed(bits)
    delta = torch.randn(32, 48, generator=generator) * (torch.rand(48, generator=generator) + 0.1)
    row, column = fit_row_column_steps(delta, bits)
    weight = np.ones(48)
    best = matrix_error(delta, row, column, bits, weight)
    for nudge in (0.97, 1.03):
        assert matrix_error(delta, row * nudge, column, bits, weight) > best
        assert matrix_error(delta, row, column * nudge, bits, weight) > best
