"""A random projection that needs no file: the same on every machine, for every width."""

from __future__ import annotations

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
    size = 1 << (width - 1).bit_length()
    signs = torch.tensor([1.0 if _scrambled(i) & 1 else -1.0 for i in range(width)], dtype=torch.float64)
    mixed = torch.zeros(rows, size, dtype=torch.float64)
    mixed[:, :width] = features * signs
    block = 1
    while block < size:
        pairs = mixed.view(rows, -1, 2, block)
        mixed = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        block *= 2
    kept = sorted(sorted(range(size), key=lambda i: _scrambled(size + i))[:rank])
    return mixed.view(rows, size)[:, kept] / rank**0.5
