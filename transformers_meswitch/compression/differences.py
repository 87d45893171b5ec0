"""Whether two parameters differ, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bit_patterns", "differs"]


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
