"""The arithmetic of the head against numpy, written anew from the equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_meswitch.errors import RouterError
from transformers_meswitch.routing.discriminant import Discriminant, calibrated_temperature
from transformers_meswitch.routing.head_fit import fit_head
from transformers_meswitch.routing.hidden_states import masked_mean
from transformers_meswitch.routing.projection import _constants, project
from transformers_meswitch.routing.statistics import ClassStatistics

SIZES = {"a": 30, "b": 7, "c": 19}


def points(seed: int = 0, rank: int = 6) -> dict[str, torch.Tensor]:
    """Classes of different sizes and places, one covariance."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rank, rank))
    return {
        label: torch.tensor(rng.normal(size=(n, rank)) @ mix + 2 * i, dtype=torch.float32)
        for i, (label, n) in enumerate(SIZES.items())
    }


def same(one: ClassStatistics, other: ClassStatistics) -> bool:
    return one.labels == other.labels and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("counts", "means", "scatters")
    )


# -- statistics ------------------------------------------------------------------------------------------------------


def test_covariance_is_numpys() -> None:
    data = points()
    centred = np.concatenate([x.numpy() - x.numpy().mean(axis=0) for x in data.values()]).astype(np.float64)
    covariance = ClassStatistics.of(data).covariance().numpy()
    np.testing.assert_allclose(covariance, centred.T @ centred / len(centred), rtol=1e-5, atol=1e-5)
    total = np.concatenate([x.numpy() for x in data.values()])
    assert not np.allclose(covariance, np.cov(total.T, bias=True), rtol=1e-2)  # not around the mean of all


@pytest.mark.parametrize("label", SIZES)
def test_adding_and_removing_is_fitting_anew_to_the_bit(label: str) -> None:
    data = points()
    others = {name: x for name, x in data.items() if name != label}
    whole, part = ClassStatistics.of(data), ClassStatistics.of(others)
    assert same(part.joined(ClassStatistics.of({label: data[label]})), whole)
    assert same(whole.only(list(others)), part)
    assert same(whole.joined(ClassStatistics.of({label: data[label] + 1})).only(list(others)), part)
    assert not same(whole, part.joined(ClassStatistics.of({label: data[label] + 1})))


# -- discriminant ----------------------------------------------------------------------------------------------------


def gaussian_log_posteriors(
    data: dict[str, torch.Tensor], x: np.ndarray, shrinkage: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bayes' rule over Gaussian densities with one covariance and equal priors, and the smallest distance."""
    arrays = [c.numpy().astype(np.float64) for c in data.values()]
    centred = np.concatenate([c - c.mean(axis=0) for c in arrays])
    covariance = centred.T @ centred / len(centred)
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / len(covariance) * np.eye(
        len(covariance)
    )
    inverse = np.linalg.inv(covariance)
    distance = np.stack([np.einsum("ni,ij,nj->n", x - m, inverse, x - m) for m in (c.mean(axis=0) for c in arrays)], 1)
    logs = -0.5 * distance
    return logs - np.log(np.exp(logs).sum(axis=1, keepdims=True)), distance.min(axis=1)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_head_is_bayes_rule_on_gaussians(shrinkage: float) -> None:
    data = points()
    x = np.random.default_rng(1).normal(size=(40, 6)) * 3
    logs, distance = gaussian_log_posteriors(data, x, shrinkage)
    head = Discriminant.of(ClassStatistics.of(data), shrinkage)
    found = head.scores(torch.tensor(x)).log_softmax(dim=1).numpy()
    np.testing.assert_allclose(found, logs, atol=1e-3, rtol=1e-4)
    np.testing.assert_allclose(head.distances(torch.tensor(x)).numpy(), distance, rtol=1e-3)
    other = Discriminant.of(ClassStatistics.of(points(seed=9)), shrinkage)
    assert not np.allclose(other.scores(torch.tensor(x)).log_softmax(dim=1).numpy(), logs, atol=0.1)


def test_counts_are_no_priors() -> None:
    data = points()
    doubled = {**data, "a": data["a"].repeat(5, 1)}
    x = torch.zeros(1, 6)
    before = Discriminant.of(ClassStatistics.of(data), 1.0)
    after = Discriminant.of(ClassStatistics.of(doubled), 1.0)
    # Only the scale of the covariance can change the scores, not an offset log(count).
    ratio = before.scores(x) / after.scores(x)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_points_without_scatter_are_no_division_by_zero() -> None:
    data = {"a": torch.zeros(5, 3), "b": torch.ones(5, 3)}
    head = Discriminant.of(ClassStatistics.of(data), 0.01)
    probabilities = head.scores(torch.tensor([[0.1, 0.0, 0.0]])).softmax(dim=1)
    assert probabilities.isfinite().all()
    assert probabilities[0, 0] > 0.99


def test_temperature_is_the_best_on_a_fine_grid() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, size=300)
    scores = rng.normal(size=(300, 3)) * 20
    scores[np.arange(300), classes] += 25

    def loss(temperature: float) -> float:
        z = scores / temperature
        z -= z.max(axis=1, keepdims=True)
        return float(-(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))[np.arange(300), classes].mean())

    found = calibrated_temperature(torch.tensor(scores), torch.tensor(classes))
    best = min(np.geomspace(1, 1000, 4000), key=loss)
    assert found == pytest.approx(best, rel=5e-3)
    assert loss(found) < loss(2 * found)
    assert calibrated_temperature(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)) == 1.0
    sure = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    assert calibrated_temperature(sure, torch.tensor([0, 1])) == 1.0
    assert calibrated_temperature(sure, torch.tensor([1, 0])) == pytest.approx(1000)


def test_probabilities_are_right_as_often_as_they_say() -> None:
    """Of overlapping classes that differ in other ways than prompts of one class do."""
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, *[1.0] * 7])
    features = {k: torch.randn(400, 1, 8, generator=rng) * spread + 0.4 * i for i, k in enumerate("ab")}
    fit = fit_head(features, [1])
    head = Discriminant.of(fit.statistics, fit.shrinkage)
    fresh = {k: torch.randn(4000, 8, generator=rng) * spread + 0.4 * i for i, k in enumerate("ab")}
    confidence, right = [], []
    for i, x in enumerate(fresh.values()):
        p, chosen = (head.scores(x) / fit.temperature).softmax(dim=1).max(dim=1)
        confidence.append(p)
        right.append((chosen == i).double())
    assert abs(float(torch.cat(confidence).mean() - torch.cat(right).mean())) < 0.03


# -- projection ------------------------------------------------------------------------------------------------------


def test_projection_is_rows_of_hadamards_matrix() -> None:
    """Up to a sign a column: the product of two rows of Hadamard's matrix is another of its rows."""
    matrix = project(torch.eye(48), 16).numpy().T * math.sqrt(16)
    hadamard = np.array([[1.0]])
    for _ in range(6):
        hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
    rows = [[k for k in range(64) if np.array_equal(row * matrix[0], hadamard[k, :48])] for row in matrix]
    assert all(len(row) == 1 for row in rows)
    assert len({row[0] for row in rows}) == 16
    assert set(matrix[0]) == {-1.0, 1.0}


def test_projection_is_frozen() -> None:
    """A saved router is of these very features: another hash or order would make nonsense of it."""
    x = torch.arange(12.0).reshape(2, 6)
    assert project(x, 2).mul(2**0.5).round(decimals=4).tolist() == FROZEN


FROZEN = [[-9.0, 5.0], [-9.0, 17.0]]


@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 100))
def test_projection_is_linear_and_keeps_lengths_on_average(width: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 5, width, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(project(x + 2 * y, rank), project(x, rank) + 2 * project(y, rank))
    assert project(x, rank).shape == (5, min(rank, width))


@pytest.mark.parametrize(("width", "rank"), [(48, 16), (100, 7), (576, 224)])
def test_projection_by_what_was_kept_is_that_made_anew(width: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    _constants.cache_clear()
    with torch.inference_mode():
        first = project(x, rank)
    again = project(x.requires_grad_(), rank)  # what was kept serves other modes too
    again.sum().backward()
    assert x.grad is not None
    assert _constants.cache_info().hits == 1
    monkeypatch.setattr("transformers_meswitch.routing.projection._constants", _constants.__wrapped__)
    anew = project(x, rank)
    assert torch.equal(first, anew)
    assert torch.equal(again, anew)


def test_projection_keeps_distances() -> None:
    x = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = torch.pdist(project(x, 256)) / torch.pdist(x)
    assert 0.7 < float(ratio.min()) < float(ratio.max()) < 1.3


# -- pooling ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 4), st.integers(0, 100))
def test_padding_on_either_side_changes_nothing(length: int, left: int, right: int, seed: int) -> None:
    hidden = torch.randn(1, left + length + right, 8, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(1, left + length + right, dtype=torch.bool)
    mask[:, left : left + length] = True
    hidden[~mask] = float("nan")
    found = masked_mean(hidden, mask)
    real = hidden[0, left : left + length].numpy().astype(np.float64)
    scaled = real / np.sqrt((real**2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(found[0].numpy(), scaled.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_summed_in_float32() -> None:
    hidden = torch.ones(1, 4096, 4, dtype=torch.bfloat16)
    assert masked_mean(hidden, torch.ones(1, 4096, dtype=torch.bool)).tolist() == [[1.0] * 4]
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(300):
        total += 1
    assert float(total) == 256  # where a sum in bfloat16 stops


# -- the fit ---------------------------------------------------------------------------------------------------------


def layered(noise: tuple[float, ...], n: int = 60) -> dict[str, torch.Tensor]:
    """Two classes that differ by 1 in every dimension, at layers of more and less noise."""
    rng = torch.Generator().manual_seed(0)
    return {
        label: torch.stack(
            [offset + s * torch.randn(n, 8, generator=rng) for s in noise],
            dim=1,
        )
        for label, offset in (("a", 0.0), ("b", 1.0))
    }


def test_layer_is_the_one_that_validates_best() -> None:
    fit = fit_head(layered((3.0, 0.1, 3.0)), [4, 5, 6])
    assert fit.layer == 5
    assert [score.layer for score in fit.scores] == [4, 5, 6]
    assert fit.scores[1].accuracy == 1.0
    assert fit.scores[0].loss > fit.scores[1].loss
    assert fit.threshold == 0.5
    assert int(fit.statistics.counts.sum()) == 120  # of all prompts in the end
    assert fit_head(layered((0.1, 3.0)), [4, 5]).layer == 4


def test_what_is_kept_out_is_unlike_what_is_fitted() -> None:
    """A layer that tells apart only prompts of the kind it has seen is worth less than one that goes on beyond."""
    rng = torch.Generator().manual_seed(0)
    along = torch.linspace(-1, 1, 100)
    features = {}
    for label, sign in (("a", 1.0), ("b", -1.0)):
        noise = 0.05 * torch.randn(100, 2, 4, generator=rng)
        noise[:, :, 0] += 5 * along.unsqueeze(1)
        noise[:, 0, 1] += sign * torch.where(along.abs() < 0.6, 1.0, -1.0)  # turns round where the prompts are unusual
        noise[:, 1, 1] += sign * 0.3
        features[label] = noise
    assert fit_head(features, [1, 2]).layer == 2


def test_hard_problems_get_a_higher_threshold() -> None:
    fit = fit_head(layered((3.0,)), [1])
    assert fit.threshold > 0.5
    assert fit_head(layered((3.0,)), [1], threshold=0.4).threshold == 0.4


def test_fit_is_deterministic_and_does_not_depend_on_the_order_of_experts() -> None:
    features = layered((1.0, 2.0))
    one, other = fit_head(features, [1, 2]), fit_head(dict(reversed(features.items())), [1, 2])
    assert same(one.statistics, other.statistics)
    assert (one.temperature, one.threshold, one.distance_limit) == (
        other.temperature, other.threshold, other.distance_limit,
    )  # fmt: skip


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(RouterError, match=r"'b' has 4 prompts.*at least 5"):
        fit_head({"a": torch.zeros(5, 1, 8), "b": torch.zeros(4, 1, 8)}, [1])
    with pytest.raises(RouterError, match="no prompts"):
        fit_head({}, [1])
