"""Which input channels to keep in 16 bit: those whose quantisation loses most of the layer's output.

ME-Switch (arXiv 2406.09041, section 3.2) ranks input channel ``i`` by its reconstruction error
``sum_j ||x_i D_ij - x_i D^_ij||²`` over the calibration inputs ``x``. Per token that is
``x_i² sum_j (D_ij - D^_ij)²``, so the mean square of the channel is all that is needed of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reconstruction_error", "select_salient"]


def reconstruction_error(delta: Tensor, approximation: Tensor, second_moment: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared output lost through each input channel.

    Args:
        delta: float32 ``[out, n]``.
        approximation: float32 ``[out, n]``, the quantised delta.
        second_moment: float32 ``[n]``: mean square of each input channel; `None` gives the weight error.

    Returns:
        float32 ``[n]``, zero or more.

    >>> reconstruction_error(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.tensor([9.0, 1.0])).tolist()
    [9.0, 4.0]
    """
    error = (delta - approximation).square().sum(dim=0)
    return error if second_moment is None else error * second_moment.to(error)


def select_salient(error: Tensor, k: int) -> Tensor:
    """The ``k`` channels of largest error; of equal ones, those of lower index.

    Args:
        error: float ``[n]``.
        k: how many, 0 to ``n``.

    Returns:
        int64 ``[k]``, ascending.

    >>> select_salient(torch.tensor([1.0, 5.0, 5.0, 5.0]), k=2).tolist()
    [1, 2]
    """
    return torch.sort(error, descending=True, stable=True).indices[:k].sort().values
