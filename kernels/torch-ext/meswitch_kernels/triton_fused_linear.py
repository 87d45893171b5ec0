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

__all__ = ["fused_linear_triton"]


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
    PART_WORDS: tl.constexpr,
    PTX: tl.constexpr,
    UNROLL: tl.constexpr,
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
        # In parts, as the codes are: each thread loads the activations that belong to its weights.
        PART_IN: tl.constexpr = min(BLOCK_IN, PART_WORDS)
        products = tl.zeros((BLOCK_OUT, PART_IN), tl.float32)
        for begin in tl.range(0, in_features, BLOCK_IN, loop_unroll_factor=UNROLL):
            for part in tl.static_range(BLOCK_IN // PART_IN):
                k = begin + part * PART_IN + tl.arange(0, PART_IN)
                k_mask = k < in_features
                xs = tl.load(x + k, mask=k_mask, other=0.0).to(tl.float32)
                where = weight_rows + k[None, :].to(tl.int64) * weight_in_stride
                w = tl.load(where, mask=n_mask[:, None] & k_mask[None, :], other=0.0)
                products += w.to(tl.float32) * xs[None, :]
        expert = tl.load(slot)
        total = tl.sum(products, axis=1) + bias
        total += delta_of_row(
            x, in_features, table, expert, row, row, values, scale, offset, rows, tiles, n, n_mask,
            PLANES, BLOCK_OUT, BLOCK_CODES, PART_WORDS, PTX, UNROLL,
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
        begin = tl.program_id(1) * BLOCK_ROWS
        for group in range(tl.load(group_count)):
            first = tl.maximum(tl.load(start + group), begin)
            last = tl.minimum(tl.load(start + group + 1), begin + BLOCK_ROWS)
            if last - first == 1:
                own = tl.load(order + first)
                delta = delta_of_row(
                    x, in_features, table, tl.load(slot + first), first, own, values, scale, offset, rows, tiles,
                    n, n_mask, PLANES, BLOCK_OUT, BLOCK_CODES, PART_WORDS, PTX, UNROLL,
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
        PART_WORDS=16 * configuration.warps,
        PTX=ptx,
        UNROLL=configuration.unroll,
        STAGES=configuration.stages,
        **configuration.launch_options(),
    )
