"""The Triton kernel of the base's matmul and the experts' deltas together. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configurations import Configuration
from .row_groups import RowGroups
from .triton_activations import PreparedActivations
from .triton_dot import dot
from .triton_expert_delta import delta_of_row, delta_of_rows
from .triton_grids import overlap_options, wait_for_previous

__all__ = ["fused_linear_triton"]


@triton.jit
def _row_times_weight(
    x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
    EVEN_IN: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row times the base's weight at some output channels: float32 ``[BLOCK_OUT]``."""
    VECTOR: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    # As of the codes: rows that the threads read at a time, and how often.
    GROUP: tl.constexpr = min(BLOCK_OUT, max(1, 32 * WARPS * VECTOR // BLOCK_IN))
    REPEATS: tl.constexpr = BLOCK_OUT // GROUP
    row = tl.where(n_mask, n, 0).to(tl.int64).reshape(GROUP, REPEATS)
    k = tl.arange(0, BLOCK_IN)[None, None, :]
    rows = weight + row[:, :, None] * weight_out_stride + k.to(tl.int64) * weight_in_stride
    k = tl.broadcast_to(k, (GROUP, 1, BLOCK_IN))
    products = tl.zeros((GROUP, REPEATS, BLOCK_IN), tl.float32)
    for begin in tl.range(0, in_features, BLOCK_IN, num_stages=STAGES):
        if EVEN_IN:
            w = tl.load(rows + begin * weight_in_stride)
            xs = tl.load(x + begin + k)
        else:
            w = tl.load(rows + begin * weight_in_stride, mask=begin + k < in_features, other=0.0)
            xs = tl.load(x + begin + k, mask=begin + k < in_features, other=0.0)
        products += w.to(tl.float32) * xs.to(tl.float32)
    return tl.sum(products, axis=2).reshape(BLOCK_OUT)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _fused_linear_kernel(
    y,
    x,
    weight,
    base_bias,
    table,
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
    weight_out_stride,
    weight_in_stride,
    tiles,
    HAS_BASE_BIAS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_IN: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program has a block of output channels and, of up to ``BLOCK_ROWS`` positions, the base and all experts.

    So the weight and each delta are read once, nothing but the result is written, and the one row of a batch of one
    needs neither a second launch nor the base's output from memory.
    """
    n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_mask = n < out_features
    weight_rows = weight + n.to(tl.int64)[:, None] * weight_out_stride
    bias = tl.zeros((BLOCK_OUT,), tl.float32)
    if HAS_BASE_BIAS:
        bias = tl.load(base_bias + n, mask=n_mask, other=0.0).to(tl.float32)

    if BLOCK_ROWS == 1:
        row = tl.load(order)
        products = _row_times_weight(
            x,
            weight,
            n,
            n_mask,
            in_features,
            weight_out_stride,
            weight_in_stride,
            EVEN_IN,
            BLOCK_IN,
            BLOCK_OUT,
            WARPS,
            STAGES,
        )
        wait_for_previous(OVERLAP)
        expert = tl.load(slot)
        total = products + bias
        total += delta_of_row(
            x, in_features, table, expert, row, row, values, scale, offset, rows, tiles, n, n_mask,
            PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX,
        )  # fmt: skip
        tl.store(y + n, total.to(y.dtype.element_ty), mask=n_mask)
    else:
        position = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = position < rows
        row = tl.load(order + position, mask=mask, other=0)
        x_rows = x + row.to(tl.int64)[:, None] * in_features
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for begin in tl.range(0, in_features, BLOCK_IN, num_stages=STAGES):
            k = begin + tl.arange(0, BLOCK_IN)
            k_mask = k < in_features
            xs = tl.load(x_rows + k[None, :], mask=mask[:, None] & k_mask[None, :], other=0.0)
            where = weight_rows + k[None, :].to(tl.int64) * weight_in_stride
            w = tl.load(where, mask=n_mask[:, None] & k_mask[None, :], other=0.0)
            total = dot(xs, w.trans(), total)
        total += bias[None, :]
        wait_for_previous(OVERLAP)
        begin = tl.program_id(1) * BLOCK_ROWS
        for group in range(tl.load(group_count)):
            first = tl.maximum(tl.load(start + group), begin)
            last = tl.minimum(tl.load(start + group + 1), begin + BLOCK_ROWS)
            if last - first == 1:
                own = tl.load(order + first)
                delta = delta_of_row(
                    x, in_features, table, tl.load(slot + first), first, own, values, scale, offset, rows, tiles,
                    n, n_mask, PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX,
                )  # fmt: skip
                total += tl.where((position == first)[:, None], delta[None, :], 0.0)
            elif last > first:
                inside = (position >= first) & (position < last)
                total += delta_of_rows(
                    x, in_features, table, tl.load(slot + first), position, row, inside, values, scale, offset, rows,
                    tiles, n, n_mask, PLANES, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, PTX, STAGES,
                )  # fmt: skip
        where = y + row.to(tl.int64)[:, None] * out_features + n[None, :]
        tl.store(where, total.to(y.dtype.element_ty), mask=mask[:, None] & n_mask[None, :])


def fused_linear_triton(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    base_bias: torch.Tensor | None,
    table: torch.Tensor,
    groups: RowGroups,
    prepared: PreparedActivations,
    planes: int,
    ptx: bool,
    overlap: bool,
    configuration: Configuration,
) -> None:
    """Write ``y``, every element of it.

    Args:
        y: contiguous ``[rows, out]`` of the dtype of ``x``: the result.
        x: contiguous ``[rows, in]``, float32, bfloat16 or float16.
        weight: ``[out, in]`` of that dtype, of any strides: the base's.
        base_bias: contiguous ``[out]`` of any floating dtype: the base's.
        table: int64 ``[slots, len(COLUMNS)]``.
        groups: the rows by expert.
        prepared: the activations, with ``planes`` and the configuration's ``block_codes``.
        planes: 0, 1 or 2.
        ptx: whether the device has NVIDIA's instructions; the same arithmetic is spelled out otherwise.
        overlap: whether to start while the activations are being prepared.
        configuration: sizes of blocks.
    """
    rows, in_features = x.shape
    out_features = y.shape[1]
    values, scale, offset = prepared
    block_rows = 1 if rows == 1 else 16
    grid = (triton.cdiv(out_features, configuration.block_out), triton.cdiv(rows, block_rows))
    _fused_linear_kernel[grid](
        y,
        x,
        weight,
        weight if base_bias is None else base_bias,  # a pointer that the specialised kernel never reads
        table,
        *groups,
        values,
        scale,
        offset,
        rows,
        out_features,
        in_features,
        *weight.stride(),
        scale.shape[1],
        HAS_BASE_BIAS=base_bias is not None,
        PLANES=planes,
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=configuration.block_out,
        BLOCK_CODES=configuration.block_codes,
        BLOCK_IN=configuration.block_in,
        WARPS=configuration.warps,
        EVEN_IN=in_features % configuration.block_in == 0,
        PTX=ptx,
        OVERLAP=overlap,
        STAGES=configuration.stages,
        **configuration.launch_options(),
        **overlap_options(overlap),
    )
