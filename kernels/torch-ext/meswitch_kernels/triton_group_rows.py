"""The Triton kernel that groups a few rows by expert: it compares all with all. Importing it needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_grids import aligned

__all__ = ["BLOCKS", "group_rows_triton"]

#: Numbers of rows that the kernel is compiled for: those of a decoding step, and as many as one program compares.
BLOCKS = (16, 128)


@triton.jit(do_not_specialize=["rows"])
def _group_rows_kernel(expert_index, order, slot, start, group_count, rows, BLOCK: tl.constexpr):
    """One program does all: ``one`` goes down its tables of pairs, and ``other`` across."""
    one = tl.arange(0, BLOCK)
    other = tl.arange(0, BLOCK)
    # Read twice, once for each direction. Beyond the rows is an expert that there is not.
    one_expert = tl.maximum(tl.load(expert_index + one, mask=one < rows, other=0), -1).to(tl.int64)
    one_expert = tl.where(one < rows, one_expert, -2)
    other_expert = tl.maximum(tl.load(expert_index + other, mask=other < rows, other=0), -1).to(tl.int64)
    other_expert = tl.where(other < rows, other_expert, -2)

    same = (one_expert[:, None] == other_expert[None, :]).to(tl.int32)
    one_earlier = (one[:, None] < other[None, :]).to(tl.int32)
    other_earlier = (other[None, :] < one[:, None]).to(tl.int32)
    one_alone = tl.sum(same, axis=1) == 1
    other_alone = tl.sum(same, axis=0) == 1
    one_first = (tl.sum(same * other_earlier, axis=1) == 0) & (one < rows)
    other_first = (tl.sum(same * one_earlier, axis=0) == 0) & (other < rows)

    # Groups of one row come first; then slots ascend, and rows of one slot.
    rank = tl.where(other_alone[None, :], 0, 1) - tl.where(one_alone[:, None], 0, 1)
    smaller = (other_expert[None, :] < one_expert[:, None]).to(tl.int32)
    among_equals = tl.maximum(smaller, same * other_earlier)
    before = tl.where(rank < 0, 1, tl.where(rank > 0, 0, among_equals)) * tl.where(other[None, :] < rows, 1, 0)
    position = tl.sum(before, axis=1)
    group = tl.sum(before * tl.where(other_first[None, :], 1, 0), axis=1)
    groups = tl.sum(one_first.to(tl.int32), axis=0)

    tl.store(order + position, one, mask=one < rows)
    tl.store(slot + position, one_expert.to(tl.int32), mask=one < rows)
    tl.store(start + group, position, mask=one_first)
    # After the last group come as many ends as make one start a row, and one more.
    tl.store(start + one, tl.zeros_like(one) + rows, mask=(one >= groups) & (one < rows))
    tl.store(start + rows, rows)
    tl.store(group_count, tl.sum((one_alone & (one < rows)).to(tl.int32), axis=0))
    tl.store(group_count + 1, groups)


def group_rows_triton(
    expert_index: torch.Tensor, order: torch.Tensor, slot: torch.Tensor, start: torch.Tensor, group_count: torch.Tensor
) -> None:
    """Write the groups, every element; arguments as of :class:`~meswitch_kernels.RowGroups`, contiguous.

    Args:
        expert_index: int32 or int64 ``[rows]``, one row or more, and no more than the last of :data:`BLOCKS`.
        order: int32 ``[rows]``: a result, as all that follow.
        slot: int32 ``[rows]``.
        start: int32 ``[rows + 1]``.
        group_count: int32 ``[2]``.
    """
    rows = expert_index.shape[0]
    block = next(block for block in BLOCKS if rows <= block)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.accelerator.device_index(expert_index.device.index):
        _group_rows_kernel[(1,)](
            aligned(expert_index), order, slot, start, group_count, rows, BLOCK=block, num_warps=8 if block > 16 else 1
        )
