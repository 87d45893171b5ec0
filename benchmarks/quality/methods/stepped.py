"""Deltas of the form ``fixed + step * level``: rounding, BitDelta and ME-Switch as published.

These are references, written from the papers and independent of the package's own compression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Compressed, Inputs

__all__ = ["Stepped", "bitdelta", "compress_stepped", "rounded"]

#: Step sizes that are tried for a row, as shares of the one whose outermost level is the row's largest value.
_SHARES = tuple(k / 40 for k in range(6, 41))


@dataclass(frozen=True)
class Stepped:
    """One linear's delta.

    Attributes:
        levels: int8 ``[out, in]``, *twice* the level, an odd number; 0 in channels that are kept.
        step: float32 ``[out]``, or ``[1]`` for one of the whole matrix.
        kept: float32 ``[out, in]``, the delta in the kept (salient) channels and 0 elsewhere; `None` without any.
        bits: bits of one level.
        channels: how many are kept.
        step_bytes: bytes of one step size.
    """

    levels: Tensor
    step: Tensor
    kept: Tensor | None
    bits: int
    channels: int
    step_bytes: int

    def delta(self) -> Tensor:
        """The delta that is stood for: float32 ``[out, in]``."""
        value = self.levels.float() * (self.step / 2)[:, None]
        return value if self.kept is None else value + self.kept

    def bytes(self) -> int:
        """Rows of codes filled up to whole bytes, step sizes, and kept channels in 16 bit with a 32-bit index each."""
        out, width = self.levels.shape
        codes = out * -(-(width - self.channels) * self.bits // 8)
        return codes + self.step_bytes * self.step.numel() + self.channels * (2 * out + 4)


def double_levels(scaled: Tensor, bits: int) -> Tensor:
    """Twice the nearest of the levels ±1/2, ±3/2, … ±(2^bits − 1)/2, as int8."""
    half = 2 ** (bits - 1)
    return (2 * scaled.floor().clamp(-half, half - 1) + 1).to(torch.int8)


def row_steps(delta: Tensor, bits: int) -> Tensor:
    """The step of each row that rounds it with the least squared error, of a grid of 35: float32 ``[out]``."""
    widest = delta.abs().amax(dim=1) / ((2**bits - 1) / 2)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in _SHARES:
        step = (widest * share).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = double_levels(delta / step[:, None], bits).float() * (step / 2)[:, None]
        error = (delta - rounded).square().sum(dim=1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return torch.where(widest > 0, best, torch.zeros_like(best))


def round_matrix(delta: Tensor, bits: int, channels: int, score: Callable[[Tensor, Tensor], Tensor]) -> Stepped:
    """Round a delta with a step a row, all but the ``channels`` input channels of the highest score.

    Args:
        delta: float32 ``[out, in]``.
        bits: bits of one level.
        channels: input channels to keep in 16 bit.
        score: (delta, rounded delta) to float ``[in]``.
    """
    step = row_steps(delta, bits)
    levels = double_levels(delta / step.clamp_min(1e-30)[:, None], bits)
    if not channels:
        return Stepped(levels, step, None, bits, 0, step_bytes=4)
    salient = score(delta, levels.float() * (step / 2)[:, None]).topk(channels).indices
    kept = torch.zeros_like(delta)
    kept[:, salient] = delta[:, salient].to(torch.bfloat16).float()
    others = delta.clone()
    others[:, salient] = 0
    # The channels that stay are rounded again, with steps that the salient ones no longer widen.
    coded = torch.ones(delta.shape[1], dtype=torch.bool, device=delta.device)
    coded[salient] = False
    step = row_steps(delta[:, coded], bits)
    levels = double_levels(others / step.clamp_min(1e-30)[:, None], bits)
    levels[:, salient] = 0
    return Stepped(levels, step, kept, bits, channels, step_bytes=4)


def rounded(inputs: Inputs, bits: int, channels: int = 0, saliency: str = "reconstruction") -> dict[str, Stepped]:
    """Every linear rounded with a step a row.

    Args:
        inputs: the expert.
        bits: bits of one level.
        channels: salient input channels a linear.
        saliency: ``"reconstruction"``, the mean square output lost through a channel, ``H_ii Σ_j (Δ_ij − Δ̂_ij)²``
            (ME-Switch, arXiv 2406.09041, section 3.2); or ``"magnitude"``, the channel's largest absolute value.
    """

    def score_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        if saliency == "magnitude":
            return lambda delta, _: delta.abs().amax(dim=0)
        return lambda delta, given: (delta - given).square().sum(dim=0) * inputs.moments[name].diagonal()

    return {name: round_matrix(inputs.delta(name), bits, channels, score_of(name)) for name in inputs.linears()}


def bitdelta(inputs: Inputs) -> dict[str, Stepped]:
    """The sign of each delta times the matrix's mean absolute delta (BitDelta, arXiv 2402.10193, equations 1 to 3)."""
    found = {}
    for name in inputs.linears():
        delta = inputs.delta(name)
        # ±1 is twice a level of ±1/2, and the step twice the scalar. The scalar is stored in 16 bit.
        found[name] = Stepped(
            torch.where(delta > 0, 1, -1).to(torch.int8), 2 * delta.abs().mean().reshape(1), None, 1, 0, step_bytes=2
        )
    return found


def compress_stepped(layers: dict[str, Stepped]) -> Compressed:
    """Deltas and bytes of all linears."""
    return Compressed(
        {name: layer.delta() for name, layer in layers.items()}, sum(layer.bytes() for layer in layers.values())
    )
