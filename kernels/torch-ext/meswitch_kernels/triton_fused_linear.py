"""The Triton kernel of one row's base and delta together. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configurations import Configuration
from .row_groups import RowGroups
from .triton_activations import PreparedActivations
from .triton_expert_delta import delta_of_row
from .triton_grids import allow_next, kernel_options, wait_for_previous

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
        here = rows + tl.cast(begin, tl.int64) * weight_in_stride
        if EVEN_IN:
            w = tl.load(here)
            xs = tl.load(x + begin + k)
        else:
            w = tl.load(here, mask=begin + k < in_features, other=0.0)
            xs = tl.load(x + begin + k, mask=begin + k < in_features, other=0.0)
        products += w.to(tl.float32) * xs.to(tl.float32)
    return tl.sum(products, axis=2).reshape(BLOCK_OUT)


@triton.jit(do_not_specialize=["tiles"])
def _fused_linear_kernel(
    y,
    x,
    weight,
    base_bias,
    table,
    slot,
    values,
    scale,
    offset,
    out_features,
    in_features,
    weight_out_stride,
    weight_in_stride,
    tiles,
    HAS_BASE_BIAS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_IN: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program has a block of output channels of the one row: the base and its expert.

    So the row needs neither a second kernel nor the base's output from memory, and the base's weight is read while
    the activations are being prepared.
    """
    allow_next(OVERLAP)
    n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_mask = n < out_features
    total = _row_times_weight(
        x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
        EVEN_IN, BLOCK_IN, BLOCK_OUT, WARPS, STAGES,
    )  # fmt: skip
    if HAS_BASE_BIAS:
        total += tl.load(base_bias + n, mask=n_mask, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    row = tl.full((), 0, tl.int32)
    total += delta_of_row(
        x, in_features, table, tl.load(slot), row, row, values, scale, offset, 1, tiles, n, n_mask,
        PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX, False,
    )  # fmt: skip
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n_mask)


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
        y: contiguous ``[1, out]`` of the dtype of ``x``: the result.
        x: contiguous ``[1, in]``, float32, bfloat16 or float16.
        weight: ``[out, in]`` of that dtype, of any strides: the base's.
        base_bias: contiguous ``[out]`` of any floating dtype: the base's.
        table: int64 ``[slots, len(COLUMNS)]``.
        groups: the row's expert.
        prepared: the activations, with ``planes`` and the configuration's ``block_codes``.
        planes: 0, 1 or 2.
        ptx: whether the device has NVIDIA's instructions; the same arithmetic is spelled out otherwise.
        overlap: whether to start while the activations are being prepared.
        configuration: sizes of blocks.
    """
    in_features, out_features = x.shape[1], y.shape[1]
    values, scale, offset = prepared
    _fused_linear_kernel[(triton.cdiv(out_features, configuration.block_out),)](
        y,
        x,
        weight,
        weight if base_bias is None else base_bias,  # a pointer that the specialised kernel never reads
        table,
        groups.slot,
        values,
        scale,
        offset,
        out_features,
        in_features,
        *weight.stride(),
        scale.shape[1],
        HAS_BASE_BIAS=base_bias is not None,
        BLOCK_IN=configuration.block_in,
        EVEN_IN=in_features % configuration.block_in == 0,
        **kernel_options(configuration, configuration.block_codes, planes, ptx, overlap),
    )
