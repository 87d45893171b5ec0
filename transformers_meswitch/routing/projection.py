"""A random projection that needs no file: the same on every machine, for every width."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["project"]

_MASK = 2**64 - 1


def _scrambled(number: int) -> int:
    """SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def _rounded_up(width: int) -> int:
    """The power of two that a Hadamard transform of so many coordinates needs."""
    return 1 << (width - 1).bit_length()


@lru_cache(maxsize=8)
def _signs_and_kept(width: int, rank: int) -> tuple[Tensor, Tensor]:
    """What the projection of one width is made of, kept as it takes thousands of hashes, far more than projecting.

    Args:
        width: of the features.
        rank: coordinates to keep, less than the width.

    Returns:
        Signs, float64 ``[width]``; and numbers of the coordinates that are kept, int64 ``[rank]``; on the CPU.
    """
    size = _rounded_up(width)
    # Whatever mode and default device the first caller is in, the tensors are for all that follow.
    with torch.inference_mode(False):
        signs = [1.0 if _scrambled(i) & 1 else -1.0 for i in range(width)]
        kept = sorted(sorted(range(size), key=lambda i: _scrambled(size + i))[:rank])
        return torch.tensor(signs, dtype=torch.float64, device="cpu"), torch.tensor(kept, device="cpu")


@lru_cache(maxsize=16)
def _hadamard(power: int) -> Tensor:
    """Hadamard's matrix of size 2 to some power in Sylvester's order, float64, on the CPU."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        for _ in range(power):
            matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
        return matrix


def project(features: Tensor, rank: int) -> Tensor:
    """Subsampled randomised Hadamard transform: it keeps distances between points, about, in far fewer dimensions.

    Signs and the coordinates that are kept come from a hash of their number, not from a random generator, whose
    numbers may change with a release (Tropp, "Improved analysis of the subsampled randomized Hadamard transform",
    arXiv 1011.1595, eq. 1.1). Being no function of the data, it is the same for experts that are added later.

    Args:
        features: ``[rows, width]``, any floating dtype.
        rank: dimensions to keep, at most the width rounded up to a power of two; where it is the width or more, the
            features are returned as they are.

    Returns:
        float64 ``[rows, min(rank, width)]``.

    >>> points = torch.eye(64)
    >>> project(points, 64).equal(points.double()), project(points, 16).shape
    (True, torch.Size([64, 16]))
    """
    features = features.double()
    rows, width = features.shape
    if rank >= width:
        return features
    size = _rounded_up(width)
    signs, kept = (part.to(features.device) for part in _signs_and_kept(width, rank))
    mixed = features.new_zeros(rows, size)
    mixed[:, :width] = features * signs
    # The matrix is the Kronecker product of two small ones, so two products do instead of a step for each power of 2.
    half = size.bit_length() // 2
    left, right = (_hadamard(n).to(features.device) for n in (half, size.bit_length() - 1 - half))
    mixed = left @ mixed.view(rows, 1 << half, -1) @ right
    return mixed.reshape(rows, size)[:, kept] / rank**0.5
