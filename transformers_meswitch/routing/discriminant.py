"""Linear discriminant analysis: from statistics to the linear head, its probabilities and their calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import ClassStatistics

__all__ = ["Discriminant", "calibrated_temperature"]


@dataclass(frozen=True, eq=False)
class Discriminant:
    """A Gaussian for each class, with one covariance for all, so that what tells them apart is linear.

    Hastie, Tibshirani and Friedman, "The elements of statistical learning", 2nd ed., eq. 4.10, with equal priors: how
    often an expert was seen in training says nothing of how often it will be asked. The covariance is shrunk towards
    a multiple of the identity (Friedman, "Regularized discriminant analysis", 1989, eq. 18).

    Attributes:
        weight: float64 ``[classes, rank]``.
        bias: float64 ``[classes]``.
        whitening: float64 ``[rank, rank]``, lower triangular: ``whitening⁻¹ (x − mean)`` has covariance 1.
        whitened_means: float64 ``[classes, rank]``: ``whitening⁻¹ mean``.

    >>> points = {"a": torch.tensor([[0.0], [2.0]]), "b": torch.tensor([[4.0], [6.0]])}
    >>> head = Discriminant.of(ClassStatistics.of(points), shrinkage=0.0)
    >>> point = torch.tensor([[3.0]])
    >>> head.scores(point).softmax(dim=1).tolist(), head.distances(point).round(decimals=4).tolist()
    ([[0.5, 0.5]], [4.0])
    """

    weight: Tensor
    bias: Tensor
    whitening: Tensor
    whitened_means: Tensor

    @classmethod
    def of(cls, statistics: ClassStatistics, shrinkage: float) -> Discriminant:
        """The head in closed form.

        Args:
            statistics: of the classes.
            shrinkage: 0 to 1, the share of the identity in the covariance.
        """
        covariance = statistics.covariance()
        scale = covariance.diagonal().mean()
        identity = torch.eye(statistics.rank, dtype=torch.float64)
        # Where all points of each class are the same, nothing is known of their scatter.
        floor = torch.finfo(torch.float32).eps * (1 + scale)
        shrunk = (1 - shrinkage) * covariance + (shrinkage * scale + floor) * identity
        whitening = torch.linalg.cholesky(shrunk)
        means = statistics.means.double()
        weight = torch.cholesky_solve(means.T, whitening).T
        return cls(weight, -0.5 * (weight * means).sum(dim=1), whitening, _whitened(means, whitening))

    def scores(self, points: Tensor) -> Tensor:
        """Log-likelihoods of points ``[n, rank]`` up to a constant a point: float64 ``[n, classes]``."""
        return points.double() @ self.weight.T + self.bias

    def distances(self, points: Tensor) -> Tensor:
        """Squared Mahalanobis distance of points ``[n, rank]`` from the nearest class mean: float64 ``[n]``.

        What is far from every class is like nothing the router was fitted to, however clear-cut its probabilities are
        (Lee et al., "A simple unified framework for detecting out-of-distribution samples", arXiv 1807.03888, eq. 2).
        """
        # The points are whitened, not their offsets from each mean, so that the solve does not grow with the classes.
        offsets = _whitened(points.double(), self.whitening).unsqueeze(1) - self.whitened_means
        return offsets.square().sum(dim=2).amin(dim=1)


def _whitened(points: Tensor, whitening: Tensor) -> Tensor:
    """``whitening⁻¹`` times each of the points ``[n, rank]``."""
    return torch.linalg.solve_triangular(whitening, points.T, upper=False).T


def calibrated_temperature(scores: Tensor, classes: Tensor) -> float:
    """The temperature at which ``softmax(scores / temperature)`` predicts best, from 1 to 1000.

    Guo et al., "On calibration of modern neural networks", arXiv 1706.04599, section 4.2. Below 1 it would claim more
    than the Gaussians themselves do.

    Args:
        scores: ``[n, classes]``.
        classes: int64 ``[n]``, the right class of each; all of them were kept out of the fit.

    >>> calibrated_temperature(torch.tensor([[8.0, 0.0], [8.0, 0.0], [0.0, 8.0]]), torch.tensor([0, 1, 1])) > 5
    True
    """

    def loss(log_temperature: float) -> float:
        logs = (scores.double() / 10**log_temperature).log_softmax(dim=1)
        return float(-logs.gather(1, classes.unsqueeze(1)).mean())

    return float(10 ** _minimum(loss, 0.0, 3.0))


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum has it, by golden-section search to 1e-4."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    while high - low > 1e-4:
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    # The ends are candidates too.
    return min((low, (low + high) / 2, high), key=function)
