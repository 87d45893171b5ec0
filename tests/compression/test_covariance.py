"""Fits to a whole second-moment matrix, against numpy on the very inputs that the matrix was made of."""

import numpy as np
import pytest
import torch

from transformers_meswitch.compression.covariance import (
    fit_column_steps,
    fit_levels_and_step,
    refit_step,
    salient_absorption,
)
from transformers_meswitch.compression.levels import code_values, nearest_levels
from transformers_meswitch.compression.linear import compress_linear, reconstruct_linear
from transformers_meswitch.compression.step_size import fit_step
from transformers_meswitch.errors import CompressionError

OUT, IN, TOKENS = 24, 40, 800


@pytest.fixture(scope="module")
def mixing():
    """Channels of a layer's inputs are correlated, and one carries most of the energy."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(IN, IN, generator=generator) * torch.arange(1, IN + 1).pow(-0.7)
    mixing[5] *= 12
    return mixing


def draw(mixing, seed):
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(seed)) @ mixing.T


@pytest.fixture(scope="module")
def inputs(mixing):
    return draw(mixing, seed=1)


@pytest.fixture(scope="module")
def covariance(inputs):
    return inputs.T @ inputs / len(inputs)


@pytest.fixture
def delta():
    delta = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)) * 0.01
    delta[4] = 0
    return delta


def lost(inputs, delta, approximation):
    """Mean squared output error of each row, in numpy from the inputs themselves."""
    error = (delta - approximation).double().numpy()
    return (inputs.double().numpy() @ error.T) ** 2 / len(inputs)


def row_losses(inputs, delta, approximation):
    return lost(inputs, delta, approximation).sum(axis=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_row_is_at_least_as_good_as_its_start_and_most_are_better(delta, covariance, inputs, bits):
    start = fit_step(delta, bits, covariance.diagonal())
    before = row_losses(inputs, delta, nearest_levels(delta / start.clamp_min(1e-9)[:, None], bits) * start[:, None])
    levels, step = fit_levels_and_step(delta, bits, covariance, start)
    after = row_losses(inputs, delta, levels * step[:, None])
    assert set(levels.unique().tolist()) <= set(code_values(bits).tolist())
    assert (after <= before * (1 + 1e-5) + 1e-12).all()
    assert after.sum() < before.sum()
    assert step[4] == 0


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_step_is_the_least_squares_one(delta, covariance, inputs, bits):
    levels, step = fit_levels_and_step(delta, bits, covariance, fit_step(delta, bits))
    for j in [0, 1, 2, 3, 5]:
        regressor = (inputs @ levels[j]).double().numpy()[:, None]
        best = np.linalg.lstsq(regressor, (inputs @ delta[j]).double().numpy(), rcond=None)[0][0]
        np.testing.assert_allclose(step[j].item(), best, rtol=1e-3)
        assert not np.isclose(step[j].item() * 1.01, best, rtol=1e-3)  # another step would be noticed


def test_scale_is_no_matter(delta, covariance):
    start = fit_step(delta, 2)
    levels, step = fit_levels_and_step(delta, 2, covariance, start)
    for scale in (1e-22, 1e15):
        same, scaled = fit_levels_and_step(delta * scale, 2, covariance, start * scale)
        assert torch.equal(same, levels)
        torch.testing.assert_close(scaled / scale, step, rtol=1e-4, atol=0)


def test_column_steps_are_a_least_squares_solution(delta, covariance, inputs):
    levels, step = fit_levels_and_step(delta, 1, covariance, fit_step(delta, 1))
    start = torch.ones(IN)
    start[3] = 0
    column = fit_column_steps(delta, levels, covariance, step, start)
    assert column[3] == 0
    # All rows in one regression: a token's output of row j is sum_i x_i q_ji step_j c_i.
    live = [i for i in range(IN) if i != 3]
    design = torch.cat([inputs[:, live] * (levels[j] * step[j])[live] for j in range(OUT)]).double().numpy()
    target = torch.cat([inputs @ delta[j] for j in range(OUT)]).double().numpy()
    best = np.linalg.lstsq(design, target, rcond=None)[0]

    def loss(c):
        return ((target - design @ c) ** 2).sum()

    floor, found = loss(best), loss(column[live].double().numpy())
    # Damping towards the start costs a little, and much less than the start does.
    assert floor <= found <= floor + 0.1 * (loss(np.ones(IN - 1)) - floor)


def test_refitted_row_steps_use_the_column_steps(delta, covariance, inputs):
    levels, step = fit_levels_and_step(delta, 2, covariance, fit_step(delta, 2))
    column = torch.rand(IN, generator=torch.Generator().manual_seed(0)) + 0.5
    row = refit_step(delta, levels * column, covariance, step)
    before = row_losses(inputs, delta, levels * column * step[:, None]).sum()
    assert row_losses(inputs, delta, levels * column * row[:, None]).sum() < 0.9 * before
    assert row[4] == 0


def test_absorption_is_the_best_that_salient_columns_can_do(covariance, inputs):
    coded = torch.tensor([i for i in range(IN) if i not in (5, 11)])
    salient = torch.tensor([5, 11])
    error = torch.randn(3, len(coded), generator=torch.Generator().manual_seed(0))
    absorbed = salient_absorption(covariance, coded, salient)
    output = (inputs[:, coded] @ error.T).double().numpy()
    best, residual = np.linalg.lstsq(inputs[:, salient].double().numpy(), output, rcond=None)[:2]
    added = (error @ absorbed.weights).double().numpy()
    np.testing.assert_allclose(added, best.T, atol=0.05 * np.abs(best).max())
    found = ((error @ absorbed.remaining) * error).sum(1).double().numpy() * len(inputs)
    np.testing.assert_allclose(found, residual, rtol=0.02)
    assert (found < 0.95 * (output**2).sum(0)).all()  # it is worth something on these inputs


def test_absorption_without_salient_channels_or_inputs(covariance):
    everything, none = torch.arange(IN), torch.tensor([], dtype=torch.int64)
    absorbed = salient_absorption(covariance, everything, none)
    assert torch.equal(absorbed.remaining, covariance)
    assert absorbed.weights.shape == (IN, 0)
    dead = covariance.clone()
    dead[5], dead[:, 5] = 0, 0
    absorbed = salient_absorption(dead, torch.tensor([0, 1]), torch.tensor([5]))
    assert not absorbed.weights.any()
    assert torch.equal(absorbed.remaining, dead[:2, :2])


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_layer_loses_less_on_inputs_not_seen(delta, covariance, mixing, bits, columns):
    unseen = draw(mixing, seed=2)

    def loss(moment):
        stored = compress_linear(delta, bits, 3, moment, columns)
        return lost(unseen, delta, reconstruct_linear(stored.record, stored.tensors)).sum()

    assert loss(covariance) < 0.9 * loss(covariance.diagonal())


def test_zero_rows_stay_exact_but_for_what_salient_columns_owe(delta, covariance):
    for columns in (False, True):
        stored = compress_linear(delta, 2, 3, covariance, columns)
        assert not reconstruct_linear(stored.record, stored.tensors)[4].any()
        assert not stored.tensors["codes"][4].any()


def test_a_matrix_without_energy_is_no_matrix(delta):
    nothing = compress_linear(delta, 2, 3, torch.zeros(IN, IN))
    for leaf, tensor in compress_linear(delta, 2, 3, torch.zeros(IN)).tensors.items():
        assert torch.equal(nothing.tensors[leaf], tensor)


def test_unfit_matrices_are_refused(delta, covariance):
    with pytest.raises(CompressionError, match=r"shape \(40, 39\), expected \[40\] or \[40, 40\]"):
        compress_linear(delta, 2, 3, covariance[:, 1:])
    covariance = covariance.clone()
    covariance[2, 3] = torch.inf
    with pytest.raises(CompressionError, match=r"second moment of the layer's inputs is inf at \[2, 3\]"):
        compress_linear(delta, 2, 3, covariance)
