"""A matrix as the product of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["low_rank"]

#: Directions looked at beyond the rank, and power iterations: a delta's spectrum is flat, so few miss some of it.
_SPARE, _ITERATIONS = 32, 6
_SEED = 0


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the truncated singular value decomposition, the best there are of a rank (Eckart and Young).

    Wide decompositions are found by randomised subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061),
    seeded, so that the same matrix gives the same factors.

    Args:
        matrix: float32 ``[out, in]``.
        rank: columns of the first factor, from 1; those beyond the matrix's own rank are zero.

    Returns:
        ``B``, float32 ``[out, rank]``, and ``A``, float32 ``[rank, in]``, with ``B @ A`` near ``matrix``; each has the
        square root of the singular values.

    >>> b, a = low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1)
    >>> (b @ a).round(decimals=4).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    out, width = matrix.shape
    kept = min(rank, out, width)
    if kept + _SPARE < min(out, width) // 2:
        drawn = torch.Generator().manual_seed(_SEED)
        found = matrix @ torch.randn(width, kept + _SPARE, generator=drawn).to(matrix)
        for _ in range(_ITERATIONS):
            found = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(found).Q).Q
        range_of = torch.linalg.qr(found).Q
        u, s, vh = torch.linalg.svd(range_of.T @ matrix, full_matrices=False)
        u = range_of @ u
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:kept].sqrt()
    b, a = matrix.new_zeros(out, rank), matrix.new_zeros(rank, width)
    b[:, :kept] = u[:, :kept] * root
    a[:kept] = root[:, None] * vh[:kept]
    return b, a
