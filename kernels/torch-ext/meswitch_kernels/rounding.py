"""Rounding a block of columns one after the other, each knowing what the rounding of those before it changed.

Rows are independent and columns are not, so plain torch needs a handful of launches for every column; the Triton
kernel does a block in one. Both error feedback (GPTQ, arXiv 2210.17323) and coordinate descent are this recurrence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from .op import has_kernel

_round_with_triton: Callable[..., None] | None = None
if importlib.util.find_spec("triton") is not None:
    from .triton_rounding import round_in_turn_triton

    _round_with_triton = round_in_turn_triton

__all__ = ["round_in_turn", "round_in_turn_reference"]

#: The kernel holds a row of a block in registers.
_MAX_COLUMNS = 256


def round_in_turn(
    values: torch.Tensor,
    step: torch.Tensor,
    mix: torch.Tensor,
    bits: int,
    *,
    column_step: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of the columns of a block, chosen from left to right.

    With ``scale[j, i] = step[j] * column_step[i]``, column ``i`` of row ``j`` is rounded at
    ``v[j, i] = values[j, i] + sum(change[j, k] * mix[k, i] for k < i)`` to its nearest mid-rise level
    ``levels[j, i]``, and ``change[j, i] = (v if start is None else start)[j, i] - levels[j, i] * scale[j, i]``.
    Where a scale is zero, so is the level's value.

    Args:
        values: float32 ``[out, n]``, at most 256 columns.
        step: float32 ``[out]``, zero or more.
        mix: float32 ``[n, n]``, zero on and below its diagonal.
        bits: bits of one code, 1 to 4.
        column_step: float32 ``[n]``, zero or more.
        start: float32 ``[out, n]``: what changes are measured from; by default the value that was rounded.

    Returns:
        ``levels`` in units of the scale, and ``change``, both float32 ``[out, n]``.

    Raises:
        ValueError: an unsupported number of bits or columns, or shapes that do not fit together.

    >>> feedback = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # what the first column loses, the second makes up for
    >>> levels, change = round_in_turn(torch.tensor([[0.9, 0.7]]), torch.tensor([1.0]), feedback, bits=2)
    >>> levels.tolist()
    [[0.5, 1.5]]
    """
    if bits not in (1, 2, 3, 4):
        raise ValueError(f"bits is {bits!r}, expected 1, 2, 3 or 4.")
    out, n = values.shape
    if n > _MAX_COLUMNS:
        raise ValueError(f"values has {n} columns, expected at most {_MAX_COLUMNS}.")
    expected = {"step": (step, (out,)), "mix": (mix, (n, n)), "column_step": (column_step, (n,))}
    for name, (tensor, shape) in {**expected, "start": (start, (out, n))}.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, expected {shape}.")
    if _round_with_triton is None or not has_kernel(values.device):
        return round_in_turn_reference(values, step, mix, bits, column_step=column_step, start=start)
    levels, change = (torch.empty(out, n, dtype=torch.float32, device=values.device) for _ in range(2))
    _round_with_triton(levels, change, values, step, mix, bits, column_step, start)
    return levels, change


def round_in_turn_reference(
    values: torch.Tensor,
    step: torch.Tensor,
    mix: torch.Tensor,
    bits: int,
    *,
    column_step: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch; arguments and results as in :func:`round_in_turn`.

    >>> round_in_turn_reference(torch.tensor([[0.7]]), torch.tensor([1.0]), torch.zeros(1, 1), bits=1)[0].tolist()
    [[0.5]]
    """
    out, n = values.shape
    half = 2 ** (bits - 1)
    # Transposed, so that a column is contiguous.
    levels, change = (torch.zeros(n, out, device=values.device) for _ in range(2))
    wanted = values.T.contiguous()
    begun = None if start is None else start.T.contiguous()
    divisor = torch.where(step > 0, step, torch.ones_like(step))
    scale = step
    for i in range(n):
        value = wanted[i] if i == 0 else torch.addmv(wanted[i], change[:i].T, mix[:i, i])
        if column_step is not None:
            scale = step * column_step[i]
            divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        level = (value / divisor).floor_().clamp_(-half, half - 1).add_(0.5)
        levels[i] = level
        torch.sub(value if begun is None else begun[i], level.mul_(scale), out=change[i])
    return levels.T.contiguous(), change.T.contiguous()
