"""The Triton kernel that writes a dense delta from its packed codes. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["dequantize_delta_triton"]

_BLOCK_ROWS = 8
_BLOCK_COLUMNS = 256


@triton.jit
def _dequantize_kernel(
    codes,
    step,
    column_step,
    salient_index,
    salient,
    delta,
    out_features,
    in_features,
    width,
    salient_channels,
    BITS: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    HAS_COLUMN_STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program writes ``[BLOCK_ROWS, BLOCK_COLUMNS]`` of the result, salient channels included.

    The result's columns, not the codes, are divided among programs, so stores are coalesced and every element is
    written exactly once.
    """
    # 64-bit rows: their product with in_features passes 2**31 for large embeddings and heads.
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = row < out_features
    column_mask = column < in_features

    # How many salient channels lie before each column: binary search, the same for all rows.
    before = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for level in tl.static_range(SEARCH_STEPS):
        probe = before + (1 << (SEARCH_STEPS - 1 - level))
        inside = probe <= salient_channels
        channel = tl.load(salient_index + probe - 1, mask=inside, other=0)
        before = tl.where(inside & (channel < column), probe, before)
    coded = column - before
    is_coded = column_mask
    if SEARCH_STEPS > 0:
        next_salient = tl.load(salient_index + before, mask=before < salient_channels, other=-1)
        is_salient = column_mask & (next_salient == column)
        is_coded = column_mask & (next_salient != column)

    coded_mask = row_mask[:, None] & is_coded[None, :]
    first_bit = coded * BITS
    byte = first_bit // 8
    codes_row = codes + row[:, None] * width
    word = tl.load(codes_row + byte[None, :], mask=coded_mask, other=0).to(tl.int32)
    if BITS == 3:
        crosses = first_bit % 8 > 8 - BITS
        high = tl.load(codes_row + byte[None, :] + 1, mask=coded_mask & crosses[None, :], other=0)
        word |= high.to(tl.int32) << 8
    code = (word >> (first_bit % 8)[None, :]) & ((1 << BITS) - 1)
    value = code.to(tl.float32) - ((1 << BITS) - 1) * 0.5
    value *= tl.load(step + row, mask=row_mask, other=0.0)[:, None]
    if HAS_COLUMN_STEP:
        value *= tl.load(column_step + coded, mask=is_coded, other=0.0)[None, :]
    if SEARCH_STEPS > 0:
        salient_mask = row_mask[:, None] & is_salient[None, :]
        kept = tl.load(salient + row[:, None] * salient_channels + before[None, :], mask=salient_mask, other=0.0)
        value = tl.where(is_salient[None, :], kept.to(tl.float32), value)
    where = delta + row[:, None] * in_features + column[None, :]
    tl.store(where, value.to(delta.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def dequantize_delta_triton(
    delta: torch.Tensor,
    codes: torch.Tensor,
    step: torch.Tensor,
    bits: int,
    *,
    salient_index: torch.Tensor | None = None,
    salient: torch.Tensor | None = None,
    column_step: torch.Tensor | None = None,
) -> None:
    """Write the dense delta into ``delta``, every element of it.

    Args:
        delta: contiguous ``[out, in]``, float32, bfloat16 or float16: the result.
        codes: uint8 ``[out, ceil(n * bits / 8)]``; this and the rest as in :func:`meswitch_kernels.dequantize_delta`.
        step: float32 ``[out]``.
        bits: bits of one code, 1 to 4.
        salient_index: int32 ``[k]``, ascending.
        salient: bfloat16 ``[out, k]``.
        column_step: float32 ``[n]``.
    """
    out_features, in_features = delta.shape
    if delta.numel() == 0:
        return
    salient_channels = 0 if salient_index is None else salient_index.shape[0]
    grid = (triton.cdiv(out_features, _BLOCK_ROWS), triton.cdiv(in_features, _BLOCK_COLUMNS))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.accelerator.device_index(delta.device.index):
        # Pointers that the specialised kernel never reads still need a tensor.
        _dequantize_kernel[grid](
            codes.contiguous(),
            step.contiguous(),
            step if column_step is None else column_step.contiguous(),
            step if salient_index is None else salient_index.contiguous(),
            step if salient is None else salient.contiguous(),
            delta,
            out_features,
            in_features,
            codes.shape[1],
            salient_channels,
            BITS=bits,
            SEARCH_STEPS=salient_channels.bit_length(),
            HAS_COLUMN_STEP=column_step is not None,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
            num_warps=4,
        )
