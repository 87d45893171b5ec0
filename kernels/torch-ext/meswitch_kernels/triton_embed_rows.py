"""The Triton kernel that replaces the base's embeddings by experts' rows. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .expert_table import COLUMNS
from .rows_leaves import BASE_ROW, OWN_DTYPES
from .rows_table import ROWS_COLUMNS

__all__ = ["embed_rows_triton"]

_BLOCK = 512

_CODED_COLUMNS = tl.constexpr(len(COLUMNS))
_CODES = tl.constexpr(COLUMNS.index("codes"))
_STEP = tl.constexpr(COLUMNS.index("step"))
_SALIENT_INDEX = tl.constexpr(COLUMNS.index("salient_index"))
_SALIENT = tl.constexpr(COLUMNS.index("salient"))
_BITS = tl.constexpr(COLUMNS.index("bits"))
_SALIENT_CHANNELS = tl.constexpr(COLUMNS.index("salient_channels"))
_ROW_BYTES = tl.constexpr(COLUMNS.index("row_bytes"))
_ROWS_COLUMNS = tl.constexpr(len(ROWS_COLUMNS))
_ROW_MAP = tl.constexpr(ROWS_COLUMNS.index("row_map"))
_OWN = tl.constexpr(ROWS_COLUMNS.index("own"))
_KNOWN = tl.constexpr(ROWS_COLUMNS.index("known"))
_OWN_DTYPE = tl.constexpr(ROWS_COLUMNS.index("own_dtype"))
_BASE_ROW = tl.constexpr(BASE_ROW)
_FLOAT32 = tl.constexpr(1 + OWN_DTYPES.index(torch.float32))
_BFLOAT16 = tl.constexpr(1 + OWN_DTYPES.index(torch.bfloat16))


@triton.jit
def _coded_row(entry, place, column, inside, BLOCK: tl.constexpr):
    """The delta of one coded row at some columns: float32 ``[BLOCK]``."""
    salient_channels = tl.load(entry + _SALIENT_CHANNELS).to(tl.int32)
    salient_index = tl.load(entry + _SALIENT_INDEX).to(tl.pointer_type(tl.int32))
    # How many salient channels lie before each column, by binary search: the last power of two that is not more than
    # their number starts it.
    before = tl.zeros((BLOCK,), tl.int32)
    span = tl.where(salient_channels > 0, 1, 0)
    while (span > 0) & (span * 2 <= salient_channels):
        span = span * 2
    while span > 0:
        probe = before + span
        here = probe <= salient_channels
        channel = tl.load(salient_index + probe - 1, mask=here, other=0)
        before = tl.where(here & (channel < column), probe, before)
        span = span // 2
    following = tl.load(salient_index + before, mask=before < salient_channels, other=-1)
    is_salient = inside & (following == column)
    is_coded = inside & (following != column)

    bits = tl.load(entry + _BITS).to(tl.int32)
    codes = tl.load(entry + _CODES).to(tl.pointer_type(tl.uint8)) + place * tl.load(entry + _ROW_BYTES)
    first_bit = (column - before) * bits
    shift = first_bit % 8
    word = tl.load(codes + first_bit // 8, mask=is_coded, other=0).to(tl.int32)
    # Only a code of three bits can end in the next byte.
    high = tl.load(codes + first_bit // 8 + 1, mask=is_coded & (shift + bits > 8), other=0).to(tl.int32)
    code = ((word | (high << 8)) >> shift) & ((1 << bits) - 1)
    step = tl.load(tl.load(entry + _STEP).to(tl.pointer_type(tl.float32)) + place)
    delta = (code.to(tl.float32) - ((1 << bits) - 1).to(tl.float32) * 0.5) * step
    salient = tl.load(entry + _SALIENT).to(tl.pointer_type(tl.bfloat16)) + place * salient_channels
    kept = tl.load(salient + before, mask=is_salient, other=0.0).to(tl.float32)
    return tl.where(is_salient, kept, delta)


@triton.jit
def _own_row(entry, where, inside, BLOCK: tl.constexpr):
    """Some elements of an expert's own rows: float32 ``[BLOCK]``."""
    address = tl.load(entry + _OWN)
    dtype = tl.load(entry + _OWN_DTYPE)
    value = tl.zeros((BLOCK,), tl.float32)
    if dtype == _FLOAT32:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + where, mask=inside, other=0.0)
    elif dtype == _BFLOAT16:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + where, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + where, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["tokens_per_row"])
def _embed_rows_kernel(
    y,
    ids,
    base_out,
    weight,
    factor,
    coded_table,
    rows_table,
    slot,
    tokens_per_row,
    width,
    weight_stride,
    HAS_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes a block of columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    expert = tl.load(slot + token // tokens_per_row)
    some = tl.maximum(expert, 0).to(tl.int64)
    entry = rows_table + some * _ROWS_COLUMNS
    name = tl.load(ids + token).to(tl.int64)
    known = (expert >= 0) & (name >= 0) & (name < tl.load(entry + _KNOWN))
    row_map = tl.load(entry + _ROW_MAP).to(tl.pointer_type(tl.int32))
    place = tl.load(row_map + name, mask=known, other=_BASE_ROW).to(tl.int64)

    where = token * width + column
    dtype = y.dtype.element_ty
    value = tl.load(base_out + where, mask=inside, other=0.0)
    if place != _BASE_ROW:
        row = tl.zeros((BLOCK,), tl.float32)
        if place > _BASE_ROW:
            row = tl.load(weight + name * weight_stride + column, mask=inside, other=0.0).to(tl.float32)
            row += _coded_row(coded_table + some * _CODED_COLUMNS, place, column, inside, BLOCK)
        else:
            row = _own_row(entry, (_BASE_ROW - 1 - place) * width + column, inside, BLOCK)
        value = row.to(dtype)
        if HAS_FACTOR:
            value = (value.to(tl.float32) * tl.load(factor).to(dtype).to(tl.float32)).to(dtype)
    tl.store(y + where, value, mask=inside)


def embed_rows_triton(
    y: torch.Tensor,
    ids: torch.Tensor,
    base_out: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    coded_table: torch.Tensor,
    rows_table: torch.Tensor,
    expert_index: torch.Tensor,
) -> None:
    """Write ``y``, every element of it.

    Args:
        y: contiguous ``[tokens, width]``: the result.
        ids: contiguous int32 or int64 ``[tokens]``.
        base_out: contiguous ``[tokens, width]`` of the dtype of ``y``: the base's embeddings, scaled.
        weight: ``[base rows, width]`` of any floating dtype, with contiguous rows: the base's, not scaled.
        scale: one floating element, or `None`.
        coded_table: int64 ``[slots, len(COLUMNS)]``.
        rows_table: int64 ``[slots, len(ROWS_COLUMNS)]``.
        expert_index: contiguous int32 ``[batch]``; each row of the batch is ``tokens / batch`` neighbours.
    """
    tokens, width = y.shape
    _embed_rows_kernel[(tokens, triton.cdiv(width, _BLOCK))](
        y,
        ids,
        base_out,
        weight,
        weight if scale is None else scale,  # a pointer that the specialised kernel never reads
        coded_table,
        rows_table,
        expert_index,
        tokens // expert_index.shape[0],
        width,
        weight.stride(0),
        HAS_FACTOR=scale is not None,
        BLOCK=_BLOCK,
        num_warps=4,
        # The product with the step is rounded before it is added, as in a merged weight.
        enable_fp_fusion=False,
    )
