"""The difference of two parameters, and whether there is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Difference", "bit_patterns", "differs"]


@dataclass(frozen=True)
class Difference:
    """An expert's matrix less the base's, formed in float32 where and when it is needed.

    Attributes:
        base: floating ``[out, in]``.
        expert: floating, of the same shape and device.

    >>> Difference(torch.ones(2, 2, dtype=torch.bfloat16), torch.full((2, 2), 3.0)).rows(1, 2).tolist()
    [[2.0, 2.0]]
    """

    base: Tensor
    expert: Tensor

    @classmethod
    def to_zero(cls, delta: Tensor) -> Difference:
        """A difference that is known already."""
        return cls(delta.new_zeros(()).expand_as(delta), delta)

    @property
    def shape(self) -> torch.Size:
        """``[out, in]``."""
        return self.expert.shape

    @property
    def device(self) -> torch.device:
        """Where both are."""
        return self.expert.device

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows from ``start`` to before ``stop``: float32, contiguous, in memory of their own."""
        expert = self.expert[start:stop].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return expert.sub_(self.base[start:stop].to(torch.float32))

    def is_zero(self) -> bool:
        """Whether all elements are equal once the base has the expert's dtype."""
        return torch.equal(self.base.to(self.expert.dtype), self.expert)

    def whole(self) -> Tensor:
        """All rows."""
        return self.rows(0, len(self.expert))


def bit_patterns(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns as integers of its shape: those of ``-0.0`` and ``0.0`` differ.

    Args:
        tensor: float32, bfloat16 or float16.

    >>> bit_patterns(torch.tensor([0.0, -0.0])).tolist()
    [0, -2147483648]
    """
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def differs(base: Tensor, expert: Tensor) -> bool:
    """Whether any element differs bitwise once the base has the expert's dtype.

    >>> differs(torch.ones(2, dtype=torch.bfloat16), torch.ones(2))
    False
    """
    return base.shape != expert.shape or not torch.equal(bit_patterns(base.to(expert)), bit_patterns(expert))
