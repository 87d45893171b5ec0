"""The Triton kernel of one row's base and delta together. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configurations import Configuration
from .row_groups import RowGroups
from .triton_activations import PreparedActivations
from .triton_codes import ask_for, load_words
from .triton_expert_delta import (
    ask_for_delta,
    coded_rows_of,
    open_expert,
    rest_of_row,
    sum_of_levels,
    tile_of_row,
)
from .triton_grids import allow_next, kernel_options, wait_for_previous

__all__ = ["fused_linear_triton"]

#: Lines of a row of the base's weight that are asked for before anything else is done.
_FIRST_LINES = tl.constexpr(32)
_LINE = tl.constexpr(128)


@triton.jit
def _ask_for_weight(weight, row, in_features, weight_out_stride, weight_in_stride, PTX: tl.constexpr):
    """Have the beginnings of some rows of the base's weight brought into the second cache."""
    ELEMENTS: tl.constexpr = _LINE * 8 // weight.dtype.element_ty.primitive_bitwidth
    k = tl.minimum(ELEMENTS * tl.arange(0, _FIRST_LINES), in_features - 1).to(tl.int64)
    where = weight + row[:, None] * weight_out_stride + k[None, :] * weight_in_stride
    ask_for(where.to(tl.int64), PTX)


@triton.jit
def _load_tile(x, weights, k, in_features, weight_in_stride, EVEN_IN: tl.constexpr):
    """Input channels ``k`` of the row and of the base's weight, or what is multiplied by zeros or not at all."""
    mask = k < in_features
    where = weights + k.to(tl.int64) * weight_in_stride
    if EVEN_IN:
        # All of a tile exists or nothing of it.
        return tl.load(x + k, mask=mask), tl.load(where, mask=mask, cache_modifier=".cg")
    else:  # noqa: RET505  # what follows a return is compiled too
        return (
            tl.load(x + k, mask=mask, other=0.0),
            tl.load(where, mask=mask, other=0.0, cache_modifier=".cg"),
        )


@triton.jit
def _fused_row(
    x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
    codes, row_words, used, values, scale, offset, tiles, steps,
    BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr,
    BLOCK_IN: tl.constexpr, EVEN_IN: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The row times the base's weight and, unless ``BITS`` is 0, an expert's codes: float32 ``[BLOCK_OUT]``.

    Tiles of the one are worked on beside those of the other, so that the memory has as much to do at any time.
    """
    VECTOR: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    # As of the codes: rows that the threads read at a time, and how often.
    GROUP: tl.constexpr = min(BLOCK_OUT, max(1, 32 * WARPS * VECTOR // BLOCK_IN))
    REPEATS: tl.constexpr = BLOCK_OUT // GROUP
    WORDS: tl.constexpr = BLOCK_CODES // (32 if BITS % 2 or BITS == 0 else 32 // BITS)
    row = tl.where(n_mask, n, 0).to(tl.int64).reshape(GROUP, REPEATS)
    weights = weight + row[:, :, None] * weight_out_stride
    k = tl.broadcast_to(tl.arange(0, BLOCK_IN)[None, None, :], (GROUP, 1, BLOCK_IN))
    products = tl.zeros((GROUP, REPEATS, BLOCK_IN // VECTOR), tl.float32)
    sums = tl.zeros((), tl.float32)
    # What the next turn needs is on its way while this one's is worked on.
    xs, w = _load_tile(x, weights, k, in_features, weight_in_stride, EVEN_IN)
    if BITS > 0:
        rows, total = coded_rows_of(codes, row_words, n, n_mask, BITS, BLOCK_OUT, BLOCK_CODES, WARPS)
        a, b, c = load_words(rows, 0, used, WORDS, BITS)
    for tile in range(tiles):
        if BITS > 0:
            next_a, next_b, next_c = load_words(rows, tile + 1, used, WORDS, BITS)
        for part in tl.static_range(BLOCK_CODES // BLOCK_IN):
            begin = tile * BLOCK_CODES + (part + 1) * BLOCK_IN
            next_xs, next_w = _load_tile(x, weights, begin + k, in_features, weight_in_stride, EVEN_IN)
            product = w.to(tl.float32) * xs.to(tl.float32)
            products += tl.sum(product.reshape(GROUP, REPEATS, BLOCK_IN // VECTOR, VECTOR), axis=3)
            xs, w = next_xs, next_w
        if BITS > 0:
            total, sums = tile_of_row(
                total, sums, a, b, c, values, scale, offset, tiles * BLOCK_CODES, tile,
                BITS, PLANES, BLOCK_CODES, PTX,
            )  # fmt: skip
            a, b, c = next_a, next_b, next_c
    result = tl.sum(products, axis=2).reshape(BLOCK_OUT)
    if BITS > 0:
        result += steps * sum_of_levels(total, sums, BITS, BLOCK_OUT)
    return result


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
):
    """A program has a block of output channels of the one row: the base and its expert.

    So the row needs neither a second kernel nor the base's output from memory. While it is found out what the expert
    has, and the activations are prepared, memory that is needed for certain is on its way.
    """
    allow_next(OVERLAP)
    n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_mask = n < out_features
    exists = tl.minimum(n, out_features - 1)
    _ask_for_weight(weight, exists.to(tl.int64), in_features, weight_out_stride, weight_in_stride, PTX)
    bits, codes, row_words, used, step, bias, salient_channels, salient_index, salient = open_expert(
        table, tl.load(slot), in_features
    )
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    steps = total
    if bits > 0:
        ask_for_delta(codes, row_words, used, step, salient_channels, salient, exists, PTX)
        steps, total = rest_of_row(x, step, bias, salient_channels, salient_index, salient, n, n_mask, BLOCK_OUT)
    if HAS_BASE_BIAS:
        total += tl.load(base_bias + n, mask=n_mask, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    if bits == 0:
        total += _fused_row(
            x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
            codes, row_words, used, values, scale, offset, tiles, steps,
            0, PLANES, BLOCK_OUT, BLOCK_CODES, BLOCK_IN, EVEN_IN, WARPS, PTX,
        )  # fmt: skip
    elif bits == 1:
        total += _fused_row(
            x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
            codes, row_words, used, values, scale, offset, tiles, steps,
            1, PLANES, BLOCK_OUT, BLOCK_CODES, BLOCK_IN, EVEN_IN, WARPS, PTX,
        )  # fmt: skip
    elif bits == 2:
        total += _fused_row(
            x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
            codes, row_words, used, values, scale, offset, tiles, steps,
            2, PLANES, BLOCK_OUT, BLOCK_CODES, BLOCK_IN, EVEN_IN, WARPS, PTX,
        )  # fmt: skip
    elif bits == 3:
        total += _fused_row(
            x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
            codes, row_words, used, values, scale, offset, tiles, steps,
            3, PLANES, BLOCK_OUT, BLOCK_CODES, BLOCK_IN, EVEN_IN, WARPS, PTX,
        )  # fmt: skip
    else:
        total += _fused_row(
            x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
            codes, row_words, used, values, scale, offset, tiles, steps,
            4, PLANES, BLOCK_OUT, BLOCK_CODES, BLOCK_IN, EVEN_IN, WARPS, PTX,
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
        EVEN_IN=in_features % configuration.block_codes == 0,
        **kernel_options(configuration, configuration.block_codes, planes, ptx, overlap),
    )
