"""The Triton kernel that corrects the base's logits by experts' rows. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configurations import Configuration
from .row_groups import RowGroups
from .rows_leaves import BASE_ROW, OWN_DTYPES
from .rows_table import ROWS_COLUMNS
from .triton_activations import PreparedActivations
from .triton_dot import dot
from .triton_expert_delta import delta_of_row, delta_of_rows
from .triton_grids import allow_next, group_launches, kernel_options, wait_for_previous

__all__ = ["head_rows_triton"]

_COLUMNS = tl.constexpr(len(ROWS_COLUMNS))
_ROW_MAP = tl.constexpr(ROWS_COLUMNS.index("row_map"))
_OWN = tl.constexpr(ROWS_COLUMNS.index("own"))
_BIAS = tl.constexpr(ROWS_COLUMNS.index("bias"))
_KNOWN = tl.constexpr(ROWS_COLUMNS.index("known"))
_OWN_DTYPE = tl.constexpr(ROWS_COLUMNS.index("own_dtype"))
_BASE_ROW = tl.constexpr(BASE_ROW)
_FLOAT32 = tl.constexpr(1 + OWN_DTYPES.index(torch.float32))
_BFLOAT16 = tl.constexpr(1 + OWN_DTYPES.index(torch.bfloat16))

#: Columns of own rows at a time.
_BLOCK_OWN = tl.constexpr(32)


@triton.jit
def _typed_of_row(own, x, place, is_own, width, BLOCK_OUT: tl.constexpr):
    """:func:`_own_of_row` for own rows of one dtype."""
    products = tl.zeros((BLOCK_OUT, _BLOCK_OWN), tl.float32)
    for begin in range(0, width, _BLOCK_OWN):
        k = begin + tl.arange(0, _BLOCK_OWN)
        xs = tl.load(x + k, mask=k < width, other=0.0)
        w = tl.load(own + place[:, None] * width + k[None, :], mask=is_own[:, None] & (k < width)[None, :], other=0.0)
        products += w.to(xs.dtype).to(tl.float32) * xs.to(tl.float32)[None, :]
    return tl.sum(products, axis=1)


@triton.jit
def _typed_of_rows(own, x, mask, place, is_own, width, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """:func:`_own_of_rows` for own rows of one dtype."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for begin in range(0, width, _BLOCK_OWN):
        k = begin + tl.arange(0, _BLOCK_OWN)
        xs = tl.load(x[:, None] + k[None, :], mask=mask[:, None] & (k < width)[None, :], other=0.0)
        w = tl.load(own + place[:, None] * width + k[None, :], mask=is_own[:, None] & (k < width)[None, :], other=0.0)
        total = dot(xs, w.to(xs.dtype).trans(), total)
    return total


@triton.jit
def _own_of_row(own, dtype, x, place, is_own, width, BLOCK_OUT: tl.constexpr):
    """Own rows, rounded to the dtype of ``x``, times one row of it: float32 ``[BLOCK_OUT]``; zero where masked."""
    product = tl.zeros((BLOCK_OUT,), tl.float32)
    if dtype == _FLOAT32:
        product = _typed_of_row(own.to(tl.pointer_type(tl.float32)), x, place, is_own, width, BLOCK_OUT)
    elif dtype == _BFLOAT16:
        product = _typed_of_row(own.to(tl.pointer_type(tl.bfloat16)), x, place, is_own, width, BLOCK_OUT)
    else:
        product = _typed_of_row(own.to(tl.pointer_type(tl.float16)), x, place, is_own, width, BLOCK_OUT)
    return product


@triton.jit
def _own_of_rows(own, dtype, x, mask, place, is_own, width, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """The same of several rows of ``x``, by pointers ``[BLOCK_ROWS]``: float32 ``[BLOCK_ROWS, BLOCK_OUT]``."""
    product = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    if dtype == _FLOAT32:
        product = _typed_of_rows(
            own.to(tl.pointer_type(tl.float32)), x, mask, place, is_own, width, BLOCK_ROWS, BLOCK_OUT
        )
    elif dtype == _BFLOAT16:
        product = _typed_of_rows(
            own.to(tl.pointer_type(tl.bfloat16)), x, mask, place, is_own, width, BLOCK_ROWS, BLOCK_OUT
        )
    else:
        product = _typed_of_rows(
            own.to(tl.pointer_type(tl.float16)), x, mask, place, is_own, width, BLOCK_ROWS, BLOCK_OUT
        )
    return product


@triton.jit(do_not_specialize=["tiles"])
def _head_rows_kernel(
    y,
    base_out,
    x,
    coded_table,
    rows_table,
    order,
    slot,
    start,
    group_count,
    values,
    scale,
    offset,
    capacity,
    base_width,
    in_features,
    tiles,
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
    """Programs share out the pairs of a group and a block of ids, of groups of one row or of several as for linears.

    A block in which the expert has no coded row, or no own row, reads none and multiplies by none.
    """
    allow_next(OVERLAP)
    wait_for_previous(OVERLAP)
    blocks = tl.cdiv(capacity, BLOCK_OUT)
    singles = tl.load(group_count)
    skipped = 0 if BLOCK_ROWS == 1 else singles
    count = singles if BLOCK_ROWS == 1 else tl.load(group_count + 1) - singles
    for work in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        group = skipped + work // blocks
        n = (work % blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        n_mask = n < capacity
        in_base = n < base_width
        first = tl.load(start + group)
        expert = tl.load(slot + first)
        entry = rows_table + tl.maximum(expert, 0).to(tl.int64) * _COLUMNS
        known = tl.where(expert >= 0, tl.load(entry + _KNOWN), 0).to(tl.int32)
        in_map = n < known
        # An expert without a map here, and the base itself, know what the base's head knows.
        is_known = n < tl.where(known > 0, known, base_width)
        row_map = tl.load(entry + _ROW_MAP).to(tl.pointer_type(tl.int32))
        place = tl.load(row_map + n, mask=in_map & n_mask, other=_BASE_ROW)
        is_coded = place > _BASE_ROW
        is_own = place < _BASE_ROW
        own_place = tl.where(is_own, _BASE_ROW - 1 - place, 0).to(tl.int64)
        place = tl.where(is_coded, place, 0)
        coding = tl.where(tl.max(is_coded.to(tl.int32), axis=0) > 0, expert, -1)
        own = tl.load(entry + _OWN)
        own_dtype = tl.where(tl.max(is_own.to(tl.int32), axis=0) > 0, tl.load(entry + _OWN_DTYPE), 0)
        bias = tl.zeros((BLOCK_OUT,), tl.float32)
        address = tl.load(entry + _BIAS)
        if (expert >= 0) & (address != 0):
            bias = tl.load(address.to(tl.pointer_type(tl.float32)) + n, mask=in_map & n_mask, other=0.0)

        if BLOCK_ROWS == 1:
            row = tl.load(order + first)
            from_base = base_out + row.to(tl.int64) * base_width + n
            logits = tl.load(from_base, mask=in_base & n_mask, other=0.0).to(tl.float32)
            delta = delta_of_row(
                x, in_features, coded_table, coding, first, row, values, scale, offset, tiles, place, is_coded,
                PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX, False,
            )  # fmt: skip
            logits += tl.where(is_coded, delta, 0.0)
            if own_dtype > 0:
                x_row = x + row.to(tl.int64) * in_features
                product = _own_of_row(own, own_dtype, x_row, own_place, is_own, in_features, BLOCK_OUT)
                logits = tl.where(is_own, product, logits)
            logits = tl.where(is_known, logits + bias, float("-inf"))
            tl.store(y + row.to(tl.int64) * capacity + n, logits.to(y.dtype.element_ty), mask=n_mask)
        else:
            last = tl.load(start + group + 1)
            for begin in range(first, last, BLOCK_ROWS):
                end = tl.minimum(begin + BLOCK_ROWS, last)
                position = begin + tl.arange(0, BLOCK_ROWS)
                mask = position < last
                row = tl.load(order + position, mask=mask, other=0).to(tl.int64)
                both = mask[:, None] & n_mask[None, :]
                from_base = base_out + row[:, None] * base_width + n[None, :]
                logits = tl.load(from_base, mask=both & in_base[None, :], other=0.0).to(tl.float32)
                delta = delta_of_rows(
                    x, in_features, coded_table, coding, begin, end, row, values, scale, offset, tiles,
                    place, is_coded, PLANES, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, WARPS, SHARERS, PTX, False, STAGES,
                )  # fmt: skip
                logits += tl.where(is_coded[None, :], delta, 0.0)
                if own_dtype > 0:
                    x_rows = x + row * in_features
                    products = _own_of_rows(
                        own, own_dtype, x_rows, mask, own_place, is_own, in_features, BLOCK_ROWS, BLOCK_OUT
                    )
                    logits = tl.where(is_own[None, :], products, logits)
                logits = tl.where(is_known[None, :], logits + bias[None, :], float("-inf"))
                tl.store(y + row[:, None] * capacity + n[None, :], logits.to(y.dtype.element_ty), mask=both)


def head_rows_triton(
    y: torch.Tensor,
    base_out: torch.Tensor,
    x: torch.Tensor,
    coded_table: torch.Tensor,
    rows_table: torch.Tensor,
    groups: RowGroups,
    prepared: PreparedActivations,
    planes: int,
    ptx: bool,
    overlap: bool,
    single: Configuration,
    several: Configuration,
) -> None:
    """Write ``y``, every element of it.

    Args:
        y: contiguous ``[rows, capacity]``: the result.
        base_out: contiguous ``[rows, base rows]`` of the dtype of ``y``, the base's logits.
        x: contiguous ``[rows, width]``, float32, bfloat16 or float16.
        coded_table: int64 ``[slots, len(COLUMNS)]``.
        rows_table: int64 ``[slots, len(ROWS_COLUMNS)]``.
        groups: the rows by expert.
        prepared: ``x`` prepared for ``coded_table``, with ``planes`` and the ``block_codes`` of ``single``.
        planes: 0, 1 or 2.
        ptx: whether the device has NVIDIA's instructions; the same arithmetic is spelled out otherwise.
        overlap: whether to start while the activations are being prepared.
        single: sizes of blocks, for groups of one row.
        several: sizes of blocks, for groups of several.
    """
    rows, in_features = x.shape
    capacity = y.shape[1]
    values, scale, offset = prepared
    for block_rows, programs, sizes in group_launches(rows, [capacity], single, several, x.device):
        _head_rows_kernel[(programs,)](
            y,
            base_out,
            x,
            coded_table,
            rows_table,
            *groups,
            values,
            scale,
            offset,
            capacity,
            base_out.shape[1],
            in_features,
            scale.shape[-1],
            BLOCK_ROWS=block_rows,
            SHARERS=sizes.sharers,
            **kernel_options(sizes, single.block_codes, planes, ptx, overlap),
        )
