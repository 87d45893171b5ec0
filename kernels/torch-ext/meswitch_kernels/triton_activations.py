"""The Triton kernel that lays a batch's activations out as the codes of each row's expert lie in memory.

The codes of a word are its low bits, the next ones, and so on, of its four bytes; the kernels mask four codes out at a
time, one a byte. With ``shifts`` codes in a byte (three bits: eight in three bytes), ``wide = 4 * shifts`` and
``words = block_codes / wide``, code ``wide * j + shifts * byte + i`` of a tile is met at word ``j`` and shift ``i``.
This kernel gathers the input channels that are not salient in that order, so the kernels that read the codes, hundreds
of times as many bytes, move nothing around. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .expert_table import COLUMNS
from .row_groups import RowGroups
from .triton_grids import allow_next, overlap_options, wait_for_previous
from .triton_joint import chosen

__all__ = ["PreparedActivations", "prepare_activations_triton"]

_COLUMNS = tl.constexpr(len(COLUMNS))
_COLUMN_STEP = tl.constexpr(COLUMNS.index("column_step"))
_SALIENT_INDEX = tl.constexpr(COLUMNS.index("salient_index"))
_BITS = tl.constexpr(COLUMNS.index("bits"))
_SALIENT_CHANNELS = tl.constexpr(COLUMNS.index("salient_channels"))

#: Salient channels that are compared with at a time.
_BLOCK_SALIENT = tl.constexpr(16)

#: Values, scales and offsets, as :func:`prepare_activations_triton` returns them.
PreparedActivations = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit(do_not_specialize=["rows", "tiles"])
def _prepare_kernel(
    x,
    tables,
    order,
    slot,
    group_count,
    values,
    scale,
    offset,
    rows,
    in_features,
    tiles,
    PLANES: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program prepares one tile of one position for one linear."""
    # In this order: after the wait all is there that the kernel which follows reads before it waits for this one.
    wait_for_previous(OVERLAP)
    allow_next(OVERLAP)
    position = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    # All that does not depend on each other is asked for at once: this kernel is a chain of waits, and others wait for
    # it.
    expert = tl.load(slot + position)
    row = tl.load(order + position).to(tl.int64)
    singles = tl.load(group_count)
    which = tl.program_id(2)
    entry = chosen(which, tables) + tl.maximum(expert, 0).to(tl.int64) * _COLUMNS
    bits = tl.load(entry + _BITS).to(tl.int32)
    salient_channels = tl.load(entry + _SALIENT_CHANNELS).to(tl.int32)
    salient_index = tl.load(entry + _SALIENT_INDEX).to(tl.pointer_type(tl.int32))
    column_step = tl.load(entry + _COLUMN_STEP)
    if expert < 0 or bits == 0:
        return
    width = tiles * BLOCK_CODES
    values += which * (tl.cast(rows, tl.int64) * width * max(1, PLANES))
    scale += which * rows * tiles
    offset += which * rows * tiles
    # Whether the position is of a group of several rows, which come after those of one, and stays in bfloat16.
    as_float = tl.full((), False, tl.int1)
    if PLANES == 2 and x.dtype.element_ty == tl.bfloat16:
        as_float = position >= singles
    shifts = tl.where(bits == 2, 4, tl.where(bits == 4, 2, 8))
    words = BLOCK_CODES // (4 * shifts)
    place = tl.arange(0, BLOCK_CODES)
    if PLANES == 0:
        # Codes are taken one at a time: a plane a byte and shift.
        plane = place // words
        shift, byte, word = plane // 4, plane % 4, place % words
    else:
        # Codes are taken four at a time: a plane a shift, with the bytes together.
        shift, byte, word = place // (4 * words), place % 4, (place // 4) % words
        # Of floats those of bytes 0 and 2, and of 1 and 3, are taken at a time.
        byte = tl.where(as_float, byte % 2 * 2 + byte // 2, byte)
    code = tile * BLOCK_CODES + 4 * shifts * word + shifts * byte + shift
    coded = code < in_features - salient_channels

    # Before coded channel c lie the salient channels of which salient_index[s] - s <= c. All are compared with, rather
    # than searched, since a search is as many loads one after the other; and one at a time, since to count along a
    # dimension is work between threads.
    before = tl.zeros((BLOCK_CODES,), tl.int32)
    for begin in range(0, salient_channels, _BLOCK_SALIENT):
        for i in tl.static_range(_BLOCK_SALIENT):
            s = begin + i
            channel = tl.load(salient_index + s, mask=s < salient_channels, other=1 << 30)
            before += (channel - s <= code).to(tl.int32)

    value = tl.load(x + row * in_features + code + before, mask=coded, other=0.0).to(tl.float32)
    if column_step != 0:
        value *= tl.load(column_step.to(tl.pointer_type(tl.float32)) + code, mask=coded, other=0.0)

    start = values + position * (width * max(1, PLANES))
    where = start + tile * BLOCK_CODES + place
    if as_float:
        kept = value.to(tl.bfloat16)
        tl.store(start.to(tl.pointer_type(tl.bfloat16)) + tile * BLOCK_CODES + place, kept)
        tl.store(offset + position * tiles + tile, tl.sum(kept.to(tl.float32), axis=0))
    elif PLANES == 0:
        tl.store(where, value)
        tl.store(offset + position * tiles + tile, tl.sum(value, axis=0))
    else:
        largest = 127.0 if PLANES == 1 else 127.0 * 256.0
        extent = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-30)
        level = tl.floor(value * (largest / extent) + 0.5).to(tl.int32)
        if PLANES == 1:
            tl.store(where, level.to(tl.int8))
        else:
            high = (level + 128) >> 8
            tl.store(where, high.to(tl.int8))
            tl.store(where + width, (level - high * 256).to(tl.int8))
        unit = extent / largest
        tl.store(scale + position * tiles + tile, unit)
        tl.store(offset + position * tiles + tile, unit * tl.sum(level, axis=0).to(tl.float32))


def prepare_activations_triton(
    x: torch.Tensor, tables: Sequence[torch.Tensor], groups: RowGroups, planes: int, block_codes: int, overlap: bool
) -> PreparedActivations:
    """Gather, scale by the column steps and, if asked to, quantise the activations of all rows that have an expert.

    An expert has other salient channels and column steps in each linear, so they are prepared for each.

    Args:
        x: contiguous ``[rows, in]``, float32, bfloat16 or float16.
        tables: int64 ``[slots, len(COLUMNS)]`` each, of the linears that ``x`` is the input of.
        groups: the rows by expert.
        planes: 0 for float32; 1 for signed bytes; 2 for 16 bit in two of them, the high ones first. But with 2,
            bfloat16 activations of groups of several rows are kept as they are.
        block_codes: codes of a tile, a power of two, 128 or more; 512 or more for groups of several rows.
        overlap: whether this kernel may start beside the one before, and the one that follows, which has to wait for
            this one itself, beside this one.

    Returns:
        Values by linear and position: float32 ``[linears, rows, tiles * block_codes]``, or int8 ``[linears, rows,
        planes, tiles * block_codes]``; zero after the last code. Scales and offsets, float32 ``[linears, rows,
        tiles]``: what one unit of the values is worth, not set where they are floating point; and the sum of the
        activations as they are stored. Nothing is set for rows that have no delta.
    """
    rows, in_features = x.shape
    tiles = triton.cdiv(in_features, block_codes)
    width = tiles * block_codes
    linears = len(tables)
    if planes:
        values = torch.empty(linears, rows, planes, width, dtype=torch.int8, device=x.device)
    else:
        values = torch.empty(linears, rows, width, dtype=torch.float32, device=x.device)
    scale, offset = torch.empty(2, linears, rows, tiles, dtype=torch.float32, device=x.device)
    _prepare_kernel[(rows, tiles, linears)](
        x,
        tuple(tables),
        groups.order,
        groups.slot,
        groups.group_count,
        values,
        scale,
        offset,
        rows,
        in_features,
        tiles,
        PLANES=planes,
        BLOCK_CODES=block_codes,
        OVERLAP=overlap,
        num_warps=4,
        **overlap_options(overlap),
    )
    return values, scale, offset
