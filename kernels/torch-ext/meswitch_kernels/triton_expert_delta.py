"""What one expert's delta makes of one row, or of several, for a block of output channels: the kernels' common part.

The functions are Triton's and are inlined. ``planes`` says how activations were prepared
(:mod:`~meswitch_kernels.triton_activations`): 0 for floating point; 1 or 2 for bytes, which go through integer dot
products: a code is never converted, and four of them cost a shift, a mask and ``dp4a``, which is what keeps the
arithmetic ahead of the memory. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expert_table import COLUMNS
from .triton_dot import dot

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
#: 2^23 as a float32, whose lowest bit is worth 1: or-ing a code into it converts the code without the conversion unit,
#: which has a quarter of the rate.
_ONES = tl.constexpr(0x4B000000)
_ONES_BASE = tl.constexpr(8388608.0)


@triton.jit
def _dp4a(codes, x, total, DP4A: tl.constexpr):
    """``total`` plus the dot product of four unsigned and four signed bytes."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(4):
        total += ((codes >> (8 * byte)) & 0xFF) * ((x << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def _load_words(codes, first, used, n_mask, BITS: tl.constexpr):
    """The words of a tile; with three bits, three times as many, regrouped so that word ``b`` has bytes ``3 i + b``.

    ``codes`` are the rows' pointers, ``first`` the tile's words in a row, ``used`` the words that a row has.
    """
    if BITS == 3:
        word = 3 * first[None, :]
        w0 = tl.load(codes + word, mask=n_mask & (word < used), other=0)
        w1 = tl.load(codes + word + 1, mask=n_mask & (word + 1 < used), other=0)
        w2 = tl.load(codes + word + 2, mask=n_mask & (word + 2 < used), other=0)
        p0 = (w0 & 0xFF) | ((w0 >> 16) & 0xFF00) | (w1 & 0xFF0000) | ((w2 & 0xFF00) << 16)
        p1 = ((w0 >> 8) & 0xFF) | ((w1 & 0xFF) << 8) | ((w1 >> 8) & 0xFF0000) | ((w2 & 0xFF0000) << 8)
        p2 = ((w0 >> 16) & 0xFF) | (w1 & 0xFF00) | ((w2 & 0xFF) << 16) | (w2 & -0x1000000)
        return p0, p1, p2
    w = tl.load(codes + first[None, :], mask=n_mask & (first < used)[None, :], other=0)
    return w, w, w


@triton.jit
def _four_codes(w0, w1, w2, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The codes at one shift, one in each byte."""
    ONES: tl.constexpr = 0x01010101
    if BITS != 3:
        return (w0 >> (BITS * SHIFT)) & (((1 << BITS) - 1) * ONES)
    if SHIFT == 0:
        return w0 & (7 * ONES)
    if SHIFT == 1:
        return (w0 >> 3) & (7 * ONES)
    if SHIFT == 2:
        return ((w0 >> 6) & (3 * ONES)) | ((w1 << 2) & (4 * ONES))
    if SHIFT == 3:
        return (w1 >> 1) & (7 * ONES)
    if SHIFT == 4:
        return (w1 >> 4) & (7 * ONES)
    if SHIFT == 5:
        return ((w1 >> 7) & ONES) | ((w2 << 1) & (6 * ONES))
    if SHIFT == 6:
        return (w2 >> 2) & (7 * ONES)
    return (w2 >> 5) & (7 * ONES)


@triton.jit
def _float_code(codes, BYTE: tl.constexpr, BITS: tl.constexpr):
    """The code in one byte, float32."""
    code = (codes >> (8 * BYTE)) & ((1 << BITS) - 1)
    return (code | _ONES).to(tl.float32, bitcast=True) - _ONES_BASE


@triton.jit
def _coded_row(
    codes, used, n_mask, x, scale, offset, low_plane, tiles,
    BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr,
    DP4A: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Levels times activations of one row, summed over the codes: float32 ``[BLOCK_OUT]``."""
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    WORDS: tl.constexpr = BLOCK_CODES // (4 * SHIFTS)
    j = tl.arange(0, WORDS)
    total = tl.zeros((BLOCK_OUT, WORDS), tl.float32)
    for tile in tl.range(tiles, num_stages=STAGES):
        w0, w1, w2 = _load_words(codes, tile * WORDS + j, used, n_mask, BITS)
        here = x + tile * BLOCK_CODES
        if PLANES == 0:
            for shift in tl.static_range(SHIFTS):
                four = _four_codes(w0, w1, w2, shift, BITS)
                for byte in tl.static_range(4):
                    xs = tl.load(here + (4 * shift + byte) * WORDS + j).to(tl.float32)
                    total += _float_code(four, byte, BITS) * xs[None, :]
        else:
            high = tl.zeros((BLOCK_OUT, WORDS), tl.int32)
            low = tl.zeros((BLOCK_OUT, WORDS), tl.int32)
            x_words = here.to(tl.pointer_type(tl.int32))
            for shift in tl.static_range(SHIFTS):
                four = _four_codes(w0, w1, w2, shift, BITS)
                xs = tl.load(x_words + shift * WORDS + j)
                high = _dp4a(four, tl.broadcast_to(xs[None, :], (BLOCK_OUT, WORDS)), high, DP4A)
                if PLANES == 2:
                    xs = tl.load(x_words + low_plane // 4 + shift * WORDS + j)
                    low = _dp4a(four, tl.broadcast_to(xs[None, :], (BLOCK_OUT, WORDS)), low, DP4A)
            if PLANES == 2:
                high = high * 256 + low
            total += high.to(tl.float32) * tl.load(scale + tile)
    # A level is less than its code by the same for all, so the sum of the activations suffices.
    sums = tl.zeros((), tl.float32)
    for tile in range(tiles):
        sums += tl.load(offset + tile)
    return tl.sum(total, axis=1) - ((1 << BITS) - 1) * 0.5 * sums


@triton.jit
def _coded_rows(
    codes, used, n_mask, x, scale, offset, low_plane, mask, tiles,
    BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_CODES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same of several rows, on tensor cores: float32 ``[BLOCK_ROWS, BLOCK_OUT]``; zero where masked."""
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    WORDS: tl.constexpr = BLOCK_CODES // (4 * SHIFTS)
    j = tl.arange(0, WORDS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for tile in tl.range(tiles, num_stages=STAGES):
        w0, w1, w2 = _load_words(codes, tile * WORDS + j, used, n_mask, BITS)
        here = x[:, None] + tile * BLOCK_CODES
        high = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.int32)
        low = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.int32)
        for shift in tl.static_range(SHIFTS):
            four = _four_codes(w0, w1, w2, shift, BITS)
            for byte in tl.static_range(4):
                if PLANES == 0:
                    xs = tl.load(here + ((4 * shift + byte) * WORDS + j)[None, :], mask=mask[:, None], other=0.0)
                    # Exact in every dtype: a code has at most four bits.
                    total = dot(xs, _float_code(four, byte, BITS).to(xs.dtype).trans(), total)
                else:
                    code = ((four >> (8 * byte)) & 0xF).to(tl.int8).trans()
                    where = here + (4 * (shift * WORDS + j) + byte)[None, :]
                    xs = tl.load(where, mask=mask[:, None], other=0)
                    high = tl.dot(xs, code, high, out_dtype=tl.int32)
                    if PLANES == 2:
                        xs = tl.load(where + low_plane, mask=mask[:, None], other=0)
                        low = tl.dot(xs, code, low, out_dtype=tl.int32)
        if PLANES > 0:
            if PLANES == 2:
                high = high * 256 + low
            total += high.to(tl.float32) * tl.load(scale + tile, mask=mask, other=0.0)[:, None]
    sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    for tile in range(tiles):
        sums += tl.load(offset + tile, mask=mask, other=0.0)
    return total - ((1 << BITS) - 1) * 0.5 * sums[:, None]


@triton.jit
def delta_of_row(
    x, in_features, table, expert, position, row, values, scale, offset, rows, tiles, n, n_mask,
    PLANES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr, DP4A: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``x[row] @ Δ̂ᵀ`` and the expert's bias difference: float32 ``[BLOCK_OUT]``; zero for the base and empty slots.

    ``expert`` is the slot or -1, ``position`` the row's place among the prepared activations, ``n`` the block's output
    channels, ``n_mask`` those that exist.
    """
    delta = tl.zeros((BLOCK_OUT,), tl.float32)
    entry = table + tl.maximum(expert, 0).to(tl.int64) * _COLUMNS
    bits = tl.where(expert >= 0, tl.load(entry + _BITS), 0).to(tl.int32)
    if bits > 0:
        salient_channels = tl.load(entry + _SALIENT_CHANNELS).to(tl.int32)
        codes = tl.load(entry + _CODES).to(tl.pointer_type(tl.int32))
        codes = tl.multiple_of(codes, 16)
        row_words = tl.multiple_of(tl.load(entry + _ROW_BYTES) >> 2, 4)
        codes = codes + n.to(tl.int64)[:, None] * row_words
        # In whole vectors of four words, which rows are padded to.
        used = tl.multiple_of(tl.cdiv((in_features - salient_channels) * bits, 128) * 4, 4)
        place = position.to(tl.int64)
        width = tiles * BLOCK_CODES
        x_here = values + place * width
        low_plane = tl.cast(rows, tl.int64) * width
        scale_here, offset_here = scale + place * tiles, offset + place * tiles
        # One kernel for all numbers of bits: a batch mixes them, and a kernel a number would be launched, and its
        # programs started, for all groups that it then skips. The branch is taken once a block and is uniform.
        if bits == 1:
            delta = _coded_row(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, tiles,
                1, PLANES, BLOCK_OUT, BLOCK_CODES, DP4A, STAGES,
            )  # fmt: skip
        elif bits == 2:
            delta = _coded_row(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, tiles,
                2, PLANES, BLOCK_OUT, BLOCK_CODES, DP4A, STAGES,
            )  # fmt: skip
        elif bits == 3:
            delta = _coded_row(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, tiles,
                3, PLANES, BLOCK_OUT, BLOCK_CODES, DP4A, STAGES,
            )  # fmt: skip
        else:
            delta = _coded_row(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, tiles,
                4, PLANES, BLOCK_OUT, BLOCK_CODES, DP4A, STAGES,
            )  # fmt: skip
        delta *= tl.load(tl.load(entry + _STEP).to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)
        salient_index = tl.load(entry + _SALIENT_INDEX).to(tl.pointer_type(tl.int32))
        salient = tl.load(entry + _SALIENT).to(tl.pointer_type(tl.bfloat16))
        for first in range(0, salient_channels, _BLOCK_SALIENT):
            k = first + tl.arange(0, _BLOCK_SALIENT)
            k_mask = k < salient_channels
            channel = tl.load(salient_index + k, mask=k_mask, other=0)
            xs = tl.load(x + row.to(tl.int64) * in_features + channel, mask=k_mask, other=0.0).to(tl.float32)
            where = salient + n.to(tl.int64)[:, None] * salient_channels + k[None, :]
            kept = tl.load(where, mask=n_mask[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
            delta += tl.sum(kept * xs[None, :], axis=1)
        bias = tl.load(entry + _BIAS)
        if bias != 0:
            delta += tl.load(bias.to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)
    return delta


@triton.jit
def delta_of_rows(
    x, in_features, table, expert, position, row, mask, values, scale, offset, rows, tiles, n, n_mask,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The same for several rows of one expert: float32 ``[BLOCK_ROWS, BLOCK_OUT]``; zero for rows that are masked.

    ``position`` and ``row`` are ``[BLOCK_ROWS]``.
    """
    delta = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    entry = table + tl.maximum(expert, 0).to(tl.int64) * _COLUMNS
    bits = tl.where(expert >= 0, tl.load(entry + _BITS), 0).to(tl.int32)
    if bits > 0:
        salient_channels = tl.load(entry + _SALIENT_CHANNELS).to(tl.int32)
        codes = tl.load(entry + _CODES).to(tl.pointer_type(tl.int32))
        codes = tl.multiple_of(codes, 16)
        row_words = tl.multiple_of(tl.load(entry + _ROW_BYTES) >> 2, 4)
        codes = codes + n.to(tl.int64)[:, None] * row_words
        used = tl.multiple_of(tl.cdiv((in_features - salient_channels) * bits, 128) * 4, 4)
        place = position.to(tl.int64)
        width = tiles * BLOCK_CODES
        x_here = values + place * width
        low_plane = tl.cast(rows, tl.int64) * width
        scale_here, offset_here = scale + place * tiles, offset + place * tiles
        if bits == 1:
            delta = _coded_rows(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, mask, tiles,
                1, PLANES, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, STAGES,
            )  # fmt: skip
        elif bits == 2:
            delta = _coded_rows(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, mask, tiles,
                2, PLANES, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, STAGES,
            )  # fmt: skip
        elif bits == 3:
            delta = _coded_rows(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, mask, tiles,
                3, PLANES, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, STAGES,
            )  # fmt: skip
        else:
            delta = _coded_rows(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, mask, tiles,
                4, PLANES, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, STAGES,
            )  # fmt: skip
        delta *= tl.load(tl.load(entry + _STEP).to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)[None, :]
        salient_index = tl.load(entry + _SALIENT_INDEX).to(tl.pointer_type(tl.int32))
        salient = tl.load(entry + _SALIENT).to(tl.pointer_type(tl.bfloat16))
        for first in range(0, salient_channels, _BLOCK_SALIENT):
            k = first + tl.arange(0, _BLOCK_SALIENT)
            k_mask = k < salient_channels
            channel = tl.load(salient_index + k, mask=k_mask, other=0)
            where = x + row.to(tl.int64)[:, None] * in_features + channel[None, :]
            xs = tl.load(where, mask=mask[:, None] & k_mask[None, :], other=0.0)
            where = salient + n.to(tl.int64)[:, None] * salient_channels + k[None, :]
            kept = tl.load(where, mask=n_mask[:, None] & k_mask[None, :], other=0.0)
            if x.dtype.element_ty == tl.bfloat16:
                delta = dot(xs, kept.trans(), delta)
            else:
                delta = dot(xs.to(tl.float32), kept.to(tl.float32).trans(), delta)
        bias = tl.load(entry + _BIAS)
        if bias != 0:
            delta += tl.load(bias.to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)[None, :]
        delta = tl.where(mask[:, None], delta, 0.0)
    return delta
