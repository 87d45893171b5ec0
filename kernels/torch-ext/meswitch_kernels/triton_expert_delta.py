"""What one expert's delta makes of one row, or of several, for a block of output channels: the kernels' common part.

The functions are Triton's and are inlined. ``planes`` says how activations were prepared
(:mod:`~meswitch_kernels.triton_activations`): 0 for floating point; 1 or 2 for bytes, which go through integer
products: a code is never converted, and four of them cost a mask and ``dp4a`` (of three bits a shift, too), which of
one row keeps the arithmetic ahead of the memory, or of several rows a share in a matrix product
(:mod:`~meswitch_kernels.triton_coded_columns`). Where there would be two bytes, several bfloat16 rows are multiplied
as they are (:mod:`~meswitch_kernels.triton_float_columns`). Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expert_table import COLUMNS
from .triton_coded_columns import coded_columns
from .triton_codes import (
    as_operand,
    by_byte,
    codes_in_place,
    dp4a,
    float_code,
    four_codes,
    load_words,
    planes,
    split_in_four,
)
from .triton_dot import dot
from .triton_float_columns import float_columns
from .triton_grids import wait_for_previous

__all__ = ["delta_of_row", "delta_of_rows"]

_COLUMNS = tl.constexpr(len(COLUMNS))
_CODES = tl.constexpr(COLUMNS.index("codes"))
_STEP = tl.constexpr(COLUMNS.index("step"))
_SALIENT_INDEX = tl.constexpr(COLUMNS.index("salient_index"))
_SALIENT = tl.constexpr(COLUMNS.index("salient"))
_BIAS = tl.constexpr(COLUMNS.index("bias"))
_BITS = tl.constexpr(COLUMNS.index("bits"))
_SALIENT_CHANNELS = tl.constexpr(COLUMNS.index("salient_channels"))
_ROW_BYTES = tl.constexpr(COLUMNS.index("row_bytes"))

_BLOCK_SALIENT = tl.constexpr(16)


@triton.jit
def _open(table, expert, in_features):
    """What the table says of an expert, in loads that wait for nothing but its slot.

    Returns:
        Bits, 0 for the base and empty slots; the pointer to the codes, the words from one row of them to the next, and
        those that are used; pointers to the steps and the bias difference, the latter perhaps null; the number of
        salient channels, and pointers to their indices and columns.
    """
    entry = table + tl.maximum(expert, 0).to(tl.int64) * _COLUMNS
    bits = tl.where(expert >= 0, tl.load(entry + _BITS), 0).to(tl.int32)
    codes = tl.multiple_of(tl.load(entry + _CODES).to(tl.pointer_type(tl.int32)), 16)
    row_words = tl.multiple_of(tl.load(entry + _ROW_BYTES) >> 2, 4)
    step = tl.load(entry + _STEP).to(tl.pointer_type(tl.float32))
    bias = tl.load(entry + _BIAS)
    salient_channels = tl.load(entry + _SALIENT_CHANNELS).to(tl.int32)
    salient_index = tl.load(entry + _SALIENT_INDEX).to(tl.pointer_type(tl.int32))
    salient = tl.load(entry + _SALIENT).to(tl.pointer_type(tl.bfloat16))
    # In whole vectors of four words, which rows are padded to.
    used = tl.multiple_of(tl.cdiv((in_features - salient_channels) * bits, 128) * 4, 4)
    return bits, codes, row_words, used, step, bias, salient_channels, salient_index, salient


@triton.jit
def _load_bias(address, n, n_mask):
    """The bias difference of some output channels, or zero: float32 ``[BLOCK_OUT]``."""
    bias = tl.zeros(n.shape, tl.float32)
    if address != 0:
        bias = tl.load(address.to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)
    return bias


@triton.jit
def _load_salient(salient_index, salient, salient_channels, first, n, n_mask):
    """Some salient channels from ``first`` on, and which exist, ``[_BLOCK_SALIENT]``; and their columns."""
    k = first + tl.arange(0, _BLOCK_SALIENT)
    k_mask = k < salient_channels
    channel = tl.load(salient_index + k, mask=k_mask, other=0)
    where = salient + n.to(tl.int64)[:, None] * salient_channels + k[None, :]
    return channel, k_mask, tl.load(where, mask=n_mask[:, None] & k_mask[None, :], other=0.0)


@triton.jit
def _bytes_of_row(total, four, x, j, PTX: tl.constexpr):
    """``total`` ``[group, repeats, words / 4]`` plus the dot products of a tile's four codes a word and activations.

    ``x`` points to the activations of one shift. Each thread loads those that belong to its own words, once for all
    of its rows.
    """
    a0, a1, a2, a3 = split_in_four(four)
    x0, x1, x2, x3 = split_in_four(tl.load(x + j))
    total = dp4a(a0, tl.broadcast_to(x0, total.shape), total, PTX)
    total = dp4a(a1, tl.broadcast_to(x1, total.shape), total, PTX)
    total = dp4a(a2, tl.broadcast_to(x2, total.shape), total, PTX)
    return dp4a(a3, tl.broadcast_to(x3, total.shape), total, PTX)


@triton.jit
def _tile_of_row(
    total, sums, a, b, c, x, scale, offset, tiles, tile,
    BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK_CODES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``total`` ``[group, repeats, words / 4]`` and ``sums`` plus what a tile's words add to them."""
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    GROUP: tl.constexpr = a.shape[0]
    WORDS: tl.constexpr = a.shape[2]
    # Codes in place are multiples of what they stand for; all are made multiples of the most.
    UNIT: tl.constexpr = 1 if BITS == 3 else 1 << (8 - BITS)
    w0, w1, w2 = by_byte(a, b, c, BITS, PTX)
    j = tl.broadcast_to(tl.arange(0, WORDS)[None, None, :], (GROUP, 1, WORDS))
    here = x + tile * BLOCK_CODES
    zeros = tl.zeros(total.shape, tl.int32)
    high, low = zeros, zeros
    for shift in tl.static_range(SHIFTS):
        if PLANES == 0:
            four = four_codes(w0, w1, w2, shift, BITS)
            for byte in tl.static_range(4):
                f0, f1, f2, f3 = split_in_four(float_code(four, byte, PTX))
                x0, x1, x2, x3 = split_in_four(tl.load(here + (4 * shift + byte) * WORDS + j))
                total += f0 * x0
                total += f1 * x1
                total += f2 * x2
                total += f3 * x3
        else:
            four = four_codes(w0, w1, w2, shift, BITS) if BITS == 3 else codes_in_place(w0, shift, BITS)
            weight = 1 if BITS == 3 else UNIT >> (BITS * shift)
            where = here.to(tl.pointer_type(tl.int32)) + shift * WORDS
            high += _bytes_of_row(zeros, four, where, j, PTX) * weight
            if PLANES == 2:
                low += _bytes_of_row(zeros, four, where + tiles * (BLOCK_CODES // 4), j, PTX) * weight
    if PLANES == 2:
        high = high * 256 + low
    if PLANES > 0:
        total += high.to(tl.float32) * (tl.load(scale + tile) * (1.0 / UNIT))
    return total, sums + tl.load(offset + tile)


@triton.jit
def _coded_row(
    codes, row_words, used, n, n_mask, x, scale, offset, tiles,
    BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr, WARPS: tl.constexpr,
    PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Levels times activations of one row, summed over the codes: float32 ``[BLOCK_OUT]``."""
    WORDS: tl.constexpr = BLOCK_CODES // (32 if BITS % 2 else 32 // BITS)
    # Rows that the threads read at a time, in vectors of four words; a thread has its words of several such groups.
    GROUP: tl.constexpr = min(BLOCK_OUT, max(1, 128 * WARPS // WORDS))
    REPEATS: tl.constexpr = BLOCK_OUT // GROUP
    # Rows that do not exist read another's codes, without a mask, which would wait with the loads.
    row = tl.where(n_mask, n, 0).to(tl.int64).reshape(GROUP, REPEATS)
    rows = codes + row[:, :, None] * row_words
    total = tl.zeros((GROUP, REPEATS, WORDS // 4), tl.float32)
    sums = tl.zeros((), tl.float32)
    # The words of the next tile are on their way while those of this one are worked on.
    a, b, c = load_words(rows, 0, used, WORDS, BITS)
    wait_for_previous(OVERLAP)
    for tile in range(tiles):
        next_a, next_b, next_c = load_words(rows, tile + 1, used, WORDS, BITS)
        total, sums = _tile_of_row(total, sums, a, b, c, x, scale, offset, tiles, tile, BITS, PLANES, BLOCK_CODES, PTX)
        a, b, c = next_a, next_b, next_c
    # A level is less than its code by the same for all, so the sum of the activations suffices.
    return tl.sum(total, axis=2).reshape(BLOCK_OUT) - ((1 << BITS) - 1) * 0.5 * sums


@triton.jit
def _coded_rows(
    codes, row_words, used, n, n_mask, x, offset, mask, tiles,
    BITS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_CODES: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Levels times floating-point activations of several rows, on tensor cores: float32 ``[BLOCK_ROWS, n]``."""
    BLOCK_ROWS: tl.constexpr = x.shape[0]
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    WORDS: tl.constexpr = BLOCK_CODES // (4 * SHIFTS)
    # Sixteen words of a row are what four threads read in vectors of four, as many as share an operand's row.
    PART: tl.constexpr = 16
    PARTS: tl.constexpr = WORDS // PART
    # A turn of the loop has 512 codes of a row, of whatever bits: enough to be worth its barriers; and their
    # activations, which are more bytes than the codes, leave room in shared memory for several programs.
    TURNS: tl.constexpr = BLOCK_CODES // 512
    SEGMENTS: tl.constexpr = 4 * SHIFTS
    # Rows that do not exist read another's codes.
    rows = codes + tl.where(n_mask, n, 0).to(tl.int64)[:, None] * row_words
    column = tl.arange(0, SEGMENTS * PART)
    here = x[:, None] + ((column // PART) * WORDS + column % PART)[None, :]
    total = tl.zeros((BLOCK_ROWS, n.shape[0]), tl.float32)
    sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    wait_for_previous(OVERLAP)
    for turn in tl.range(tiles * TURNS, num_stages=STAGES):
        tile = turn // TURNS
        for own_part in tl.static_range(PARTS // TURNS):
            part = turn % TURNS * (PARTS // TURNS) + own_part
            a, b, c = load_words(rows, tile * PARTS + part, used, PART, BITS)
            w0, w1, w2 = by_byte(a, b, c, BITS, PTX)
            code = as_operand(planes(w0, w1, w2, 0, SHIFTS, BITS, DTYPE, PTX), SEGMENTS).trans()
            where = here + tile * BLOCK_CODES + part * PART
            xs = as_operand(tl.load(where, mask=mask[:, None], other=0).to(DTYPE), SEGMENTS)
            total = dot(xs, code, total)
        sums += tl.load(offset + tile, mask=mask & (turn % TURNS == 0), other=0.0)
    return total - ((1 << BITS) - 1) * 0.5 * sums[:, None]


@triton.jit
def _columns(
    codes, row_words, used, bits, n, n_mask, values, scale, offset, first, last, tiles,
    PLANES: tl.constexpr, FLOATS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_CODES: tl.constexpr, WARPS: tl.constexpr, SHARERS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Levels times activations of ``BLOCK_ROWS`` rows."""
    if FLOATS:
        return float_columns(
            codes, row_words, used, bits, n, n_mask, values, offset, first, last, tiles,
            BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, WARPS, SHARERS, PTX, OVERLAP,
        )  # fmt: skip
    else:  # noqa: RET505  # what follows a return is compiled too
        return coded_columns(
            codes, row_words, used, bits, n, n_mask, values, scale, offset, first, last, tiles,
            PLANES, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, WARPS, SHARERS, PTX, OVERLAP,
        )  # fmt: skip


@triton.jit
def _columns_of_rows(
    codes, row_words, used, bits, n, n_mask, first, last, values, scale, offset, tiles,
    PLANES: tl.constexpr, FLOATS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_CODES: tl.constexpr, WARPS: tl.constexpr, SHARERS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The same of activations in bytes or, with ``FLOATS``, in bfloat16, where there are codes."""
    # As many as have eight columns, the fewest that tensor cores take, together.
    FEW: tl.constexpr = 8 if FLOATS else 8 // PLANES
    if last - first <= FEW:
        few = _columns(
            codes, row_words, used, bits, n, n_mask, values, scale, offset, first, last, tiles,
            PLANES, FLOATS, FEW, BLOCK_OUT, BLOCK_CODES, WARPS, SHARERS, PTX, OVERLAP,
        )  # fmt: skip
        levels = tl.broadcast_to(few[None], (BLOCK_ROWS // FEW, FEW, BLOCK_OUT)).reshape(BLOCK_ROWS, BLOCK_OUT)
    else:
        levels = _columns(
            codes, row_words, used, bits, n, n_mask, values, scale, offset, first, last, tiles,
            PLANES, FLOATS, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, WARPS, SHARERS, PTX, OVERLAP,
        )  # fmt: skip
    return levels


@triton.jit
def _rest_of_row(
    x_row, step, bias, salient_channels, salient_index, salient, n, n_mask, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """What a delta has beside codes, at some output channels: steps, and bias and salient channels times ``x_row``.

    Both float32 ``[BLOCK_OUT]``.
    """
    products = tl.zeros((BLOCK_OUT, _BLOCK_SALIENT), tl.float32)
    for first in range(0, salient_channels, _BLOCK_SALIENT):
        channel, k_mask, kept = _load_salient(salient_index, salient, salient_channels, first, n, n_mask)
        xs = tl.load(x_row + channel, mask=k_mask, other=0.0).to(tl.float32)
        products += kept.to(tl.float32) * xs[None, :]
    steps = tl.load(step + n, mask=n_mask, other=0.0)
    return steps, _load_bias(bias, n, n_mask) + tl.sum(products, axis=1)


@triton.jit
def delta_of_row(
    x, in_features, table, expert, position, row, values, scale, offset, tiles, n, n_mask,
    PLANES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """``x[row] @ Δ̂ᵀ`` and the expert's bias difference: float32 ``[BLOCK_OUT]``; zero for the base and empty slots.

    ``expert`` is the slot or -1, ``position`` the row's place among the prepared activations, ``n`` the block's output
    channels, ``n_mask`` those that exist. Prepared activations are waited for, if there is an ``OVERLAP``, when the
    first codes are on their way.
    """
    bits, codes, row_words, used, step, bias, salient_channels, salient_index, salient = _open(
        table, expert, in_features
    )
    delta = tl.zeros((BLOCK_OUT,), tl.float32)
    if bits > 0:
        place = position.to(tl.int64)
        width = tiles * BLOCK_CODES
        x_here = values + place * (width * max(1, PLANES))
        scale_here, offset_here = scale + place * tiles, offset + place * tiles
        # One kernel for all numbers of bits: a batch mixes them, and a kernel a number would be launched, and its
        # programs started, for all groups that it then skips. The branch is taken once a block and is uniform.
        if bits == 1:
            delta = _coded_row(
                codes, row_words, used, n, n_mask, x_here, scale_here, offset_here, tiles,
                1, PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX, OVERLAP,
            )  # fmt: skip
        elif bits == 2:
            delta = _coded_row(
                codes, row_words, used, n, n_mask, x_here, scale_here, offset_here, tiles,
                2, PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX, OVERLAP,
            )  # fmt: skip
        elif bits == 3:
            delta = _coded_row(
                codes, row_words, used, n, n_mask, x_here, scale_here, offset_here, tiles,
                3, PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX, OVERLAP,
            )  # fmt: skip
        else:
            delta = _coded_row(
                codes, row_words, used, n, n_mask, x_here, scale_here, offset_here, tiles,
                4, PLANES, BLOCK_OUT, BLOCK_CODES, WARPS, PTX, OVERLAP,
            )  # fmt: skip
        steps, rest = _rest_of_row(
            x + row.to(tl.int64) * in_features, step, bias, salient_channels, salient_index, salient, n, n_mask,
            BLOCK_OUT,
        )  # fmt: skip
        delta = delta * steps + rest
    return delta


@triton.jit
def delta_of_rows(
    x, in_features, table, expert, first, last, row, values, scale, offset, tiles, n, n_mask,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr,
    WARPS: tl.constexpr, SHARERS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for several rows of one expert: float32 ``[BLOCK_ROWS, BLOCK_OUT]``.

    ``row`` ``[BLOCK_ROWS]`` are those at the positions from ``first`` on. What is returned for positions from ``last``
    on may be anything.
    """
    bits, codes, row_words, used, step, bias, salient_channels, salient_index, salient = _open(
        table, expert, in_features
    )
    delta = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    if bits > 0:
        if PLANES == 0:
            position = first + tl.arange(0, BLOCK_ROWS)
            x_here = values + position.to(tl.int64) * (tiles * BLOCK_CODES)
            offset_here = offset + position.to(tl.int64) * tiles
            DTYPE: tl.constexpr = x.dtype.element_ty
            if bits == 1:
                delta = _coded_rows(
                    codes, row_words, used, n, n_mask, x_here, offset_here, position < last, tiles,
                    1, DTYPE, BLOCK_CODES, PTX, OVERLAP, STAGES,
                )  # fmt: skip
            elif bits == 2:
                delta = _coded_rows(
                    codes, row_words, used, n, n_mask, x_here, offset_here, position < last, tiles,
                    2, DTYPE, BLOCK_CODES, PTX, OVERLAP, STAGES,
                )  # fmt: skip
            elif bits == 3:
                delta = _coded_rows(
                    codes, row_words, used, n, n_mask, x_here, offset_here, position < last, tiles,
                    3, DTYPE, BLOCK_CODES, PTX, OVERLAP, STAGES,
                )  # fmt: skip
            else:
                delta = _coded_rows(
                    codes, row_words, used, n, n_mask, x_here, offset_here, position < last, tiles,
                    4, DTYPE, BLOCK_CODES, PTX, OVERLAP, STAGES,
                )  # fmt: skip
        elif used > 0:
            FLOATS: tl.constexpr = PLANES == 2 and x.dtype.element_ty == tl.bfloat16
            delta = _columns_of_rows(
                codes, row_words, used, bits, n, n_mask, first, last, values, scale, offset, tiles,
                PLANES, FLOATS, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, WARPS, SHARERS, PTX, OVERLAP,
            )  # fmt: skip
        delta = delta * tl.load(step + n, mask=n_mask, other=0.0)[None, :] + _load_bias(bias, n, n_mask)[None, :]
        x_rows = x + row.to(tl.int64)[:, None] * in_features
        for begin in range(0, salient_channels, _BLOCK_SALIENT):
            channel, k_mask, kept = _load_salient(salient_index, salient, salient_channels, begin, n, n_mask)
            xs = tl.load(x_rows + channel[None, :], mask=k_mask[None, :], other=0.0)
            if x.dtype.element_ty == tl.bfloat16:
                delta = dot(xs, kept.trans(), delta)
            else:
                delta = dot(xs.to(tl.float32), kept.to(tl.float32).trans(), delta)
    return delta
