"""The Triton kernel that rounds the columns of a block in turn. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["round_in_turn_triton"]

#: Rows of one program. Rows are independent; few of them keep all multiprocessors busy and the tile in registers.
_BLOCK_ROWS = 16


@triton.jit
def _round_in_turn_kernel(
    values,
    step,
    column_step,
    mix,
    start,
    levels,
    change,
    out_features,
    n,
    BITS: tl.constexpr,
    HAS_COLUMN_STEP: tl.constexpr,
    HAS_START: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program rounds all columns of ``BLOCK_ROWS`` rows, which it holds in registers meanwhile."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    row_mask = row < out_features
    mask = row_mask[:, None] & (column < n)[None, :]
    where = row[:, None] * n + column[None, :]
    pending = tl.load(values + where, mask=mask, other=0.0)
    row_step = tl.load(step + row, mask=row_mask, other=0.0)
    begun = pending
    if HAS_START:
        begun = tl.load(start + where, mask=mask, other=0.0)
    half = 1 << (BITS - 1)
    chosen = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    changed = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for i in range(n):
        here = (column == i)[None, :]
        value = tl.sum(tl.where(here, pending, 0.0), axis=1)
        scale = row_step
        if HAS_COLUMN_STEP:
            scale = scale * tl.load(column_step + i)
        level = tl.floor(value / tl.where(scale > 0, scale, 1.0))
        level = tl.minimum(tl.maximum(level, -half), half - 1) + 0.5
        reference = value
        if HAS_START:
            reference = tl.sum(tl.where(here, begun, 0.0), axis=1)
        difference = reference - level * scale
        chosen = tl.where(here, level[:, None], chosen)
        changed = tl.where(here, difference[:, None], changed)
        # Row i of ``mix`` is zero up to column i, so columns that are done with stay as they are.
        pending += difference[:, None] * tl.load(mix + i * n + column, mask=column < n, other=0.0)[None, :]
    tl.store(levels + where, chosen, mask=mask)
    tl.store(change + where, changed, mask=mask)


def round_in_turn_triton(
    levels: torch.Tensor,
    change: torch.Tensor,
    values: torch.Tensor,
    step: torch.Tensor,
    mix: torch.Tensor,
    bits: int,
    column_step: torch.Tensor | None,
    start: torch.Tensor | None,
) -> None:
    """Write ``levels`` and ``change``, every element; arguments as in :func:`meswitch_kernels.round_in_turn`.

    Args:
        levels: contiguous float32 ``[out, n]``: a result.
        change: contiguous float32 ``[out, n]``: a result.
        values: float32 ``[out, n]``; this and the rest as there.
        step: float32 ``[out]``.
        mix: float32 ``[n, n]``.
        bits: bits of one code, 1 to 4.
        column_step: float32 ``[n]``.
        start: float32 ``[out, n]``.
    """
    out_features, n = values.shape
    if values.numel() == 0:
        return
    with torch.accelerator.device_index(values.device.index):
        # Pointers that the specialised kernel never reads still need a tensor.
        _round_in_turn_kernel[(triton.cdiv(out_features, _BLOCK_ROWS),)](
            values.contiguous(),
            step.contiguous(),
            step if column_step is None else column_step.contiguous(),
            mix.contiguous(),
            step if start is None else start.contiguous(),
            levels,
            change,
            out_features,
            n,
            BITS=bits,
            HAS_COLUMN_STEP=column_step is not None,
            HAS_START=start is not None,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLUMNS=triton.next_power_of_2(n),
            num_warps=4,
        )
