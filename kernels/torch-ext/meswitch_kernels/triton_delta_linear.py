"""The Triton kernel that adds experts' deltas to the base's output. Importing this module needs Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .configurations import Configuration
from .row_groups import RowGroups
from .triton_activations import PreparedActivations
from .triton_expert_delta import delta_of_row, delta_of_rows
from .triton_grids import allow_next, group_launches, kernel_options, wait_for_previous
from .triton_joint import blocks_of, chosen, linear_of_block

__all__ = ["delta_linear_triton"]


@triton.jit(do_not_specialize=["rows", "tiles"])
def _delta_linear_kernel(
    ys,
    base_outs,
    x,
    tables,
    order,
    slot,
    start,
    group_count,
    values,
    scale,
    offset,
    rows,
    out_features,
    in_features,
    tiles,
    HAS_BASE: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    WARPS: tl.constexpr,
    SHARERS: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs share out the pairs of a group and a block of output channels of a linear, so a delta is read once.

    With one row a program, the groups are those of one row; with more, the others. How many groups there are is known
    on the device only; a grid of programs for all that there could be would spend its time on starting those that find
    nothing to do.
    """
    allow_next(OVERLAP)
    blocks = blocks_of(out_features, BLOCK_OUT)
    width = tl.cast(rows, tl.int64) * (tiles * BLOCK_CODES * max(1, PLANES))
    singles = tl.load(group_count)
    skipped = 0 if BLOCK_ROWS == 1 else singles
    count = singles if BLOCK_ROWS == 1 else tl.load(group_count + 1) - singles
    for work in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        group = skipped + work // blocks
        which, block = linear_of_block(work % blocks, out_features, BLOCK_OUT)
        y, base_out, table = chosen(which, ys), chosen(which, base_outs), chosen(which, tables)
        own_values = values + which * width
        own_scale, own_offset = scale + which * rows * tiles, offset + which * rows * tiles
        channels = chosen(which, out_features)
        n = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        n_mask = n < channels
        # The groups of one row come first.
        first = group if BLOCK_ROWS == 1 else tl.load(start + group)
        expert = tl.load(slot + first)
        if BLOCK_ROWS == 1:
            row = tl.load(order + first)
            delta = delta_of_row(
                x, in_features, table, expert, first, row, own_values, own_scale, own_offset, tiles, n, n_mask,
                PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX, OVERLAP,
            )  # fmt: skip
            where = row.to(tl.int64) * channels + n
            if HAS_BASE:
                delta += tl.load(base_out + where, mask=n_mask, other=0.0).to(tl.float32)
            tl.store(y + where, delta.to(y.dtype.element_ty), mask=n_mask)
        else:
            last = tl.load(start + group + 1)
            for begin in range(first, last, BLOCK_ROWS):
                end = tl.minimum(begin + BLOCK_ROWS, last)
                position = begin + tl.arange(0, BLOCK_ROWS)
                mask = position < last
                row = tl.load(order + position, mask=mask, other=0)
                delta = delta_of_rows(
                    x, in_features, table, expert, begin, end, row, own_values, own_scale, own_offset, tiles,
                    n, n_mask, PLANES, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, WARPS, SHARERS, PTX, OVERLAP, STAGES,
                )  # fmt: skip
                where = row.to(tl.int64)[:, None] * channels + n[None, :]
                both = mask[:, None] & n_mask[None, :]
                if HAS_BASE:
                    delta += tl.load(base_out + where, mask=both, other=0.0).to(tl.float32)
                tl.store(y + where, delta.to(y.dtype.element_ty), mask=both)
    # One program has to, whether it found something to do or not: see :func:`allow_next`. Others that found nothing
    # make room at once, for the kernel of the other groups, which can so begin while activations are being prepared.
    if tl.program_id(0) == 0:
        wait_for_previous(OVERLAP)


def delta_linear_triton(
    ys: Sequence[torch.Tensor],
    base_outs: Sequence[torch.Tensor] | None,
    x: torch.Tensor,
    tables: Sequence[torch.Tensor],
    groups: RowGroups,
    prepared: PreparedActivations,
    planes: int,
    ptx: bool,
    overlap: bool,
    single: Configuration,
    several: Configuration,
) -> None:
    """Write each ``y`` of some linears of one input, every element of it.

    Args:
        ys: by linear, contiguous ``[rows, out]`` of the dtype of ``x``: the results.
        base_outs: contiguous ``[rows, out]`` each of that dtype, the base's outputs; zero if `None`. They may be
            ``ys``.
        x: contiguous ``[rows, in]``, float32, bfloat16 or float16.
        tables: int64 ``[slots, len(COLUMNS)]`` each.
        groups: the rows by expert.
        prepared: the activations, with ``planes`` and the ``block_codes`` of ``single``.
        planes: 0, 1 or 2.
        ptx: whether the device has NVIDIA's instructions; the same arithmetic is spelled out otherwise.
        overlap: whether to start while the activations are being prepared.
        single: sizes of blocks, for groups of one row.
        several: sizes of blocks, for groups of several.
    """
    rows, in_features = x.shape
    out_features = tuple(y.shape[1] for y in ys)
    values, scale, offset = prepared
    for block_rows, programs, sizes in group_launches(rows, out_features, single, several, x.device):
        _delta_linear_kernel[(programs,)](
            tuple(ys),
            tuple(ys if base_outs is None else base_outs),  # pointers that the specialised kernel never reads
            x,
            tuple(tables),
            *groups,
            values,
            scale,
            offset,
            rows,
            out_features,
            in_features,
            scale.shape[-1],
            HAS_BASE=base_outs is not None,
            BLOCK_ROWS=block_rows,
            SHARERS=sizes.sharers,
            **kernel_options(sizes, single.block_codes, planes, ptx, overlap),
        )
