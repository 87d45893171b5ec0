"""The Triton kernel of one row's base and delta together. Importing this module needs Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .configurations import Configuration
from .row_groups import RowGroups
from .triton_activations import PreparedActivations
from .triton_expert_delta import delta_of_row
from .triton_grids import allow_next, kernel_options, wait_for_previous
from .triton_joint import chosen, linear_of_block

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
    ys,
    x,
    weights,
    base_biases,
    tables,
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
    """A program has a block of output channels of the one row and one linear: the base and its expert.

    So the row needs neither a second kernel nor the base's output from memory, and the base's weight is read while
    the activations are being prepared.
    """
    allow_next(OVERLAP)
    which, block = linear_of_block(tl.program_id(0), out_features, BLOCK_OUT)
    weight, table = chosen(which, weights), chosen(which, tables)
    n = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_mask = n < chosen(which, out_features)
    total = _row_times_weight(
        x, weight, n, n_mask, in_features, weight_out_stride, weight_in_stride,
        EVEN_IN, BLOCK_IN, BLOCK_OUT, WARPS, STAGES,
    )  # fmt: skip
    if HAS_BASE_BIAS:
        total += tl.load(chosen(which, base_biases) + n, mask=n_mask, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    row = tl.full((), 0, tl.int32)
    values += which.to(tl.int64) * (tiles * BLOCK_CODES * max(1, PLANES))
    total += delta_of_row(
        x, in_features, table, tl.load(slot), row, row, values, scale + which * tiles, offset + which * tiles,
        tiles, n, n_mask,
        PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX, False,
    )  # fmt: skip
    y = chosen(which, ys)
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n_mask)


def fused_linear_triton(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    base_biases: Sequence[torch.Tensor] | None,
    tables: Sequence[torch.Tensor],
    groups: RowGroups,
    prepared: PreparedActivations,
    planes: int,
    ptx: bool,
    overlap: bool,
    configuration: Configuration,
) -> None:
    """Write each ``y`` of some linears of one input, every element of it.

    Args:
        ys: by linear, contiguous ``[1, out]`` of the dtype of ``x``: the results.
        x: contiguous ``[1, in]``, float32, bfloat16 or float16.
        weights: ``[out, in]`` each of that dtype, of any strides, which are the same: the base's.
        base_biases: contiguous ``[out]`` each of one floating dtype: the base's; `None` where no linear has one.
        tables: int64 ``[slots, len(COLUMNS)]`` each.
        groups: the row's expert.
        prepared: the activations, with ``planes`` and the configuration's ``block_codes``.
        planes: 0, 1 or 2.
        ptx: whether the device has NVIDIA's instructions; the same arithmetic is spelled out otherwise.
        overlap: whether to start while the activations are being prepared.
        configuration: sizes of blocks.
    """
    in_features, out_features = x.shape[1], tuple(y.shape[1] for y in ys)
    values, scale, offset = prepared
    _fused_linear_kernel[(sum(triton.cdiv(out, configuration.block_out) for out in out_features),)](
        tuple(ys),
        x,
        tuple(weights),
        tuple(weights if base_biases is None else base_biases),  # pointers that the specialised kernel never reads
        tuple(tables),
        groups.slot,
        values,
        scale,
        offset,
        out_features,
        in_features,
        *weights[0].stride(),
        scale.shape[-1],
        HAS_BASE_BIAS=base_biases is not None,
        BLOCK_IN=configuration.block_in,
        EVEN_IN=in_features % configuration.block_in == 0,
        **kernel_options(configuration, configuration.block_codes, planes, ptx, overlap),
    )
