"""The Triton kernel of a norm whose rows have their own experts' weights. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .op import has_ptx
from .triton_grids import aligned, allow_next, overlap_options, overlaps, wait_for_previous

__all__ = ["norm_rows_triton"]

#: Elements of a row that a thread holds, a load of 16 bytes of a 16-bit dtype, unless there are more than
#: :data:`_MAX_WARPS` times 32 such threads.
_THREAD_ELEMENTS = 8
_MAX_WARPS = 16


@triton.jit(do_not_specialize=["rows_per_expert"])
def _norm_rows_kernel(
    y,
    x,
    weight,
    own_weights,
    has,
    slot,
    rows_per_expert,
    width,
    eps,
    ROUND_FIRST: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program normalises one row."""
    # In this order: after the wait all is there that the kernel which follows reads before it waits for this one.
    wait_for_previous(OVERLAP)
    allow_next(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    # Both weights are read, since waiting for the slot and then for what it has, to read one, takes longer.
    chosen = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    expert = tl.load(slot + row // rows_per_expert).to(tl.int64)
    some = tl.maximum(expert, 0)
    has_own = (expert >= 0) & (tl.load(has + some) != 0)
    own = tl.load(own_weights + some * width + column, mask=inside, other=0.0).to(tl.float32)
    chosen = tl.where(has_own, own, chosen)

    value *= tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    dtype = y.dtype.element_ty
    if ROUND_FIRST:
        value = value.to(dtype).to(tl.float32)
    if PLUS_ONE:
        chosen += 1.0
    tl.store(y + row * width + column, (value * chosen).to(dtype), mask=inside)


def norm_rows_triton(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    own_weights: torch.Tensor,
    has: torch.Tensor,
    expert_index: torch.Tensor,
    eps: float,
    form: str,
) -> None:
    """Write ``y``, every element of it.

    Args:
        y: contiguous ``[rows, width]``: the result.
        x: contiguous ``[rows, width]`` of the dtype of ``y``, as all floating tensors here.
        weight: contiguous ``[width]``, the base's.
        own_weights: contiguous ``[slots, width]``, the experts'.
        has: contiguous bool ``[slots]``.
        expert_index: contiguous int32 ``[batch]``; each row of the batch is ``rows / batch`` neighbours.
        eps: what is added to the mean of squares.
        form: one of :data:`~meswitch_kernels.NormForm`.

    Once it has run for a width, dtype and form, graphs capture it for any number of rows.
    """
    rows, width = y.shape
    x, weight, own_weights, has, expert_index = map(aligned, (x, weight, own_weights, has, expert_index))
    block = triton.next_power_of_2(width)
    overlap = overlaps(y.device, has_ptx(y.device))
    _norm_rows_kernel[(rows,)](
        y,
        x,
        weight,
        own_weights,
        has,
        expert_index,
        rows // expert_index.shape[0],
        width,
        eps,
        ROUND_FIRST=form == "round_first",
        PLUS_ONE=form == "plus_one",
        BLOCK=block,
        OVERLAP=overlap,
        num_warps=min(_MAX_WARPS, max(1, block // (32 * _THREAD_ELEMENTS))),
        **overlap_options(overlap),
    )
