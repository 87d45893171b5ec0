"""A random projection that needs no file: the same on every machine, for every width."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

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


def _hadamard(power: int) -> Tensor:
    """Hadamard's matrix of size 2 to some power in Sylvester's order, float64, on the CPU."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


@lru_cache(maxsize=8)
def _constants(width: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the projection of one width is made of, kept as it takes thousands of hashes, far more than projecting.

    Args:
        width: of the features.
        rank: coordinates to keep, less than the width.
        device: where they are used.

    Returns:
        Signs, float64 ``[width]``; the two matrices whose Kronecker product is Hadamard's, float64; and numbers of the
        coordinates that are kept, int64 ``[rank]``.
    """
    size = _rounded_up(width)
    half = size.bit_length() // 2
    # Whatever mode and default device the first caller is in, the tensors are for all that follow.
    with torch.inference_mode(False):
        signs = [1.0 if _scrambled(i) & 1 else -1.0 for i in range(width)]
        kept = sorted(sorted(range(size), key=lambda i: _scrambled(size + i))[:rank])
        return (
            torch.tensor(signs, dtype=torch.float64, device=device),
            _hadamard(half).to(device),
            _hadamard(size.bit_length() - 1 - half).to(device),
            torch.tensor(kept, device=device),
        )


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
    signs, left, right, kept = _constants(width, rank, features.device)
    mixed = nn.functional.pad(features * signs, (0, _rounded_up(width) - width))
    # The matrix is the Kronecker product of two small ones, so two products do instead of a step for each power of 2.
    mixed = left @ mixed.view(rows, len(left), -1) @ right
    return mixed.flatten(1).index_select(1, kept) / rank**0.5
