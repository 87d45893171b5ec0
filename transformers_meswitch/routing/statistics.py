"""What a router keeps of each expert's prompts: how many, their mean, and how they scatter around it.

These are sufficient statistics of linear discriminant analysis: nothing else of the prompts has any influence on the
head once layer and shrinkage are chosen. Each expert's are its own, so that adding or removing an expert gives, to the
bit, the statistics of the same features taken all at once; nobody needs the other experts' prompts again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ClassStatistics"]


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Statistics of some classes of points.

    Attributes:
        labels: names of the classes, sorted.
        counts: int64 ``[classes]``, points of each.
        means: float32 ``[classes, rank]``.
        scatters: float32 ``[classes, rank · (rank + 1) / 2]``, upper triangles, row by row, of
            ``Σ (x − mean)(x − mean)ᵀ``.

    >>> points = {"a": torch.tensor([[0.0], [2.0]]), "b": torch.tensor([[5.0], [5.0]])}
    >>> statistics = ClassStatistics.of(points)
    >>> statistics.means.tolist(), statistics.scatters.tolist()
    ([[1.0], [5.0]], [[2.0], [0.0]])
    >>> statistics.only(["a"]).labels, statistics.covariance().tolist()
    (('a',), [[0.5]])
    """

    labels: tuple[str, ...]
    counts: Tensor
    means: Tensor
    scatters: Tensor

    @classmethod
    def of(cls, points: Mapping[str, Tensor]) -> ClassStatistics:
        """The statistics of points ``[n, rank]`` of each class, summed in float64."""
        labels = tuple(sorted(points))
        counts, means, scatters = [], [], []
        for label in labels:
            x = points[label].double()
            centred = x - x.mean(dim=0)
            counts.append(len(x))
            means.append(x.mean(dim=0).float())
            scatters.append(_packed(centred.T @ centred).float())
        return cls(labels, torch.tensor(counts), torch.stack(means), torch.stack(scatters))

    @property
    def rank(self) -> int:
        """Dimensions of the points."""
        return int(self.means.shape[1])

    def joined(self, other: ClassStatistics) -> ClassStatistics:
        """These and other classes; a class of both is the other's."""
        own = self.only([label for label in self.labels if label not in other.labels])
        labels = [*own.labels, *other.labels]
        order = sorted(range(len(labels)), key=labels.__getitem__)
        return ClassStatistics(
            tuple(labels[i] for i in order),
            torch.cat([own.counts, other.counts])[order],
            torch.cat([own.means, other.means])[order],
            torch.cat([own.scatters, other.scatters])[order],
        )

    def only(self, labels: Sequence[str]) -> ClassStatistics:
        """Those of some of the classes."""
        kept = [i for i, label in enumerate(self.labels) if label in labels]
        return ClassStatistics(
            tuple(self.labels[i] for i in kept), self.counts[kept], self.means[kept], self.scatters[kept]
        )

    def covariance(self) -> Tensor:
        """Pooled covariance within classes, float64 ``[rank, rank]``: ``Σ scatters / Σ counts``.

        By the likelihood's own divisor, so that it exists for any number of points.
        """
        total = self.scatters.double().sum(dim=0) / float(self.counts.sum())
        full = torch.zeros(self.rank, self.rank, dtype=torch.float64)
        row, column = torch.triu_indices(self.rank, self.rank)
        full[row, column] = total
        full[column, row] = total
        return full


def _packed(matrix: Tensor) -> Tensor:
    row, column = torch.triu_indices(*matrix.shape)
    return matrix[row, column]
