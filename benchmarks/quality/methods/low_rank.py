"""Deltas as products of two thin matrices: what "extract a LoRA" gives, and Delta-CoMe's mixed precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Compressed, Inputs

__all__ = ["mixed_precision_svd", "truncated_svd"]

_SVD = "svd"
#: Shares of the bytes that go to singular vectors of 8, 3 and 2 bits, the largest singular values first.
_SHARES = ((8, 0.125), (3, 0.375), (2, 0.5))
#: Elements of a vector that share a step size of 16 bits.
_GROUP = 128


def singular_vectors(delta: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` with ``A @ B`` the delta and column k of ``A`` times row k of ``B`` its k-th singular part.

    Through the eigenvectors of the smaller Gram matrix, which is many times quicker than an SVD. Those are orthonormal
    to float32 whatever the singular values are, so a product of leading parts is a projection of the delta.

    Args:
        delta: float32 ``[out, in]``.

    Returns:
        float32 ``[out, r]`` and ``[r, in]``, largest first; the singular values are divided evenly between them.
    """
    wide = delta.shape[0] < delta.shape[1]
    matrix = delta.T if wide else delta
    gram = matrix.double().T @ matrix.double()
    values, right = torch.linalg.eigh((gram / gram.diagonal().amax().clamp_min(1e-300)).float())
    right = right[:, values.argsort(descending=True)]
    parts = matrix @ right
    root = parts.square().sum(dim=0).sqrt().sqrt().clamp_min(1e-30)
    left, other = parts / root, right * root
    return (other, left.T) if wide else (left, other.T)


def _factors(inputs: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    return inputs.shared(_SVD, lambda: {name: singular_vectors(inputs.delta(name)) for name in inputs.linears()})


def truncated_svd(inputs: Inputs, budget: dict[str, int]) -> Compressed:
    """The leading singular parts that fit a byte budget, both factors in bfloat16.

    Args:
        inputs: the expert.
        budget: bytes of each linear.
    """
    deltas, size = {}, 0
    for name, (left, right) in _factors(inputs).items():
        rank = budget[name] // (2 * (left.shape[0] + right.shape[1]))
        deltas[name] = left[:, :rank].bfloat16().float() @ right[:rank].bfloat16().float()
        size += 2 * rank * (left.shape[0] + right.shape[1])
    return Compressed(deltas, size, seconds_of=(_SVD,))


def vector_bytes(length: int, bits: int) -> int:
    """Bytes of one quantised vector: codes filled up to whole bytes, and a 16-bit step for every 128 elements."""
    return -(-length * bits // 8) + 2 * -(-length // _GROUP)


def quantize_vectors(vectors: Tensor, bits: int) -> Tensor:
    """Rows rounded to ``bits`` with the best of a grid of steps for every 128 elements.

    Args:
        vectors: float32 ``[r, n]``.
        bits: bits of one element.

    Returns:
        float32 ``[r, n]``.
    """
    rows, length = vectors.shape
    grouped = F.pad(vectors, (0, -length % _GROUP)).view(rows, -1, _GROUP)
    # What fills the last group up is no element, and must not count in its error.
    real = F.pad(torch.ones_like(vectors), (0, -length % _GROUP)).view(rows, -1, _GROUP)
    widest = grouped.abs().amax(dim=2, keepdim=True).clamp_min(1e-30) / ((2**bits - 1) / 2)
    best, least = torch.zeros_like(grouped), torch.full_like(widest, torch.inf)
    for share in range(4, 21):
        step = (widest * (share / 20)).bfloat16().float()
        rounded = step * ((grouped / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5)
        error = ((grouped - rounded).square() * real).sum(dim=2, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best.flatten(1)[:, :length]


def mixed_precision_svd(inputs: Inputs, budget: dict[str, int]) -> Compressed:
    """Singular vectors in fewer bits the smaller their singular value: the idea of Delta-CoMe (arXiv 2406.08903).

    The right vectors are rounded; the left ones are fitted again to the layer's inputs, ``A = Δ H Bᵀ (B H Bᵀ)⁻¹``, and
    rounded too. Delta-CoMe rounds with GPTQ where this rounds to nearest.

    Args:
        inputs: the expert.
        budget: bytes of each linear.
    """
    deltas, size = {}, 0
    for name, (left, right) in _factors(inputs).items():
        out, width = left.shape[0], right.shape[1]
        bits_of, left_over = [], 0.0
        for bits, share in _SHARES:
            left_over += share * budget[name]
            each = vector_bytes(out, bits) + vector_bytes(width, bits)
            fits = min(int(left_over // each), len(right) - len(bits_of))
            bits_of += [bits] * fits
            left_over -= fits * each
        rank, kinds = len(bits_of), torch.tensor(bits_of, device=left.device)
        rounded = torch.zeros_like(right[:rank])
        for bits in set(bits_of):
            rounded[kinds == bits] = quantize_vectors(right[:rank][kinds == bits], bits)
        moment = inputs.moments[name].double()
        basis = rounded.double()
        gram = basis @ moment @ basis.T
        gram += torch.eye(rank, dtype=gram.dtype, device=gram.device) * gram.diagonal().mean().clamp_min(1e-30) * 1e-6
        fitted = torch.linalg.solve(gram, basis @ moment @ inputs.delta(name).double().T).float()
        again = torch.zeros_like(fitted)
        for bits in set(bits_of):
            again[kinds == bits] = quantize_vectors(fitted[kinds == bits], bits)
        deltas[name] = again.T @ rounded
        size += sum(vector_bytes(out, bits) + vector_bytes(width, bits) for bits in bits_of)
    return Compressed(deltas, size, seconds_of=(_SVD,))
