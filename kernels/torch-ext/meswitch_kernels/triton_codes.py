"""Packed codes in registers: words of them, four at a time in the bytes of a word, or all of a tile as a matrix.

The functions are Triton's and are inlined. ``PTX`` says that NVIDIA's instructions may be used; else the same
arithmetic is spelled out. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dp4a", "float_code", "four_codes", "load_words", "planes"]

#: 2^23 as a float32, whose lowest bit is worth 1: a code put into its lowest byte is converted without the conversion
#: unit, which has a quarter of the rate.
_ONES = tl.constexpr(0x4B000000)
_ONES_BASE = tl.constexpr(8388608.0)


@triton.jit
def dp4a(codes, x, total, PTX: tl.constexpr):
    """``total`` plus the dot product of four unsigned and four signed bytes."""
    if PTX:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(4):
        total += ((codes >> (8 * byte)) & 0xFF) * ((x << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def _split_in_four(words):
    """``[rows, 4 * columns]`` to the four ``[rows, columns]`` whose elements are neighbours; registers only."""
    ROWS: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1] // 4
    even, odd = tl.split(words.reshape(ROWS, COLUMNS, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _merge_four(first, second, third, fourth):
    """Undo :func:`_split_in_four`."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return pairs.reshape(first.shape[0], 4 * first.shape[1])


@triton.jit
def _side_by_side(left, right):
    """``[rows, columns]`` twice to ``[rows, 2 * columns]``; registers only."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def _pick_bytes(a, b, SELECTOR: tl.constexpr):
    """PTX ``prmt``: hexadecimal digit ``i`` of the selector is the byte, of ``b:a``, that becomes byte ``i``."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, SELECTOR], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _by_byte(w0, w1, w2, PTX: tl.constexpr):
    """Twelve bytes in three words, regrouped so that word ``b`` has the bytes ``3 * i + b``."""
    if PTX:
        p0 = _pick_bytes(_pick_bytes(w0, w1, 0x0630), w2, 0x5210)
        p1 = _pick_bytes(_pick_bytes(w0, w1, 0x0741), w2, 0x6210)
        p2 = _pick_bytes(_pick_bytes(w0, w1, 0x0052), w2, 0x7410)
    else:
        p0 = (w0 & 0xFF) | ((w0 >> 16) & 0xFF00) | (w1 & 0xFF0000) | ((w2 & 0xFF00) << 16)
        p1 = ((w0 >> 8) & 0xFF) | ((w1 & 0xFF) << 8) | ((w1 >> 8) & 0xFF0000) | ((w2 & 0xFF0000) << 8)
        p2 = ((w0 >> 16) & 0xFF) | (w1 & 0xFF00) | ((w2 & 0xFF) << 16) | (w2 & -0x1000000)
    return p0, p1, p2


@triton.jit
def load_words(codes, tile, used, n_mask, WORDS: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """The words of a tile, int32 ``[BLOCK_OUT, WORDS]``; with three bits, three of them, as :func:`_by_byte` has them.

    ``codes`` are the rows' pointers ``[BLOCK_OUT, 1]`` and ``used`` the words that a row has, a multiple of four.
    """
    j = tl.arange(0, WORDS)
    if BITS == 3:
        # Twelve words are four groups of three. Three loads of four neighbouring words each are wide loads.
        word = 3 * WORDS * tile + (j // 4) * 12 + j % 4
        a = tl.load(codes + word[None, :], mask=n_mask & (word < used)[None, :], other=0)
        b = tl.load(codes + (word + 4)[None, :], mask=n_mask & (word + 4 < used)[None, :], other=0)
        c = tl.load(codes + (word + 8)[None, :], mask=n_mask & (word + 8 < used)[None, :], other=0)
        a0, a1, a2, a3 = _split_in_four(a)
        b0, b1, b2, b3 = _split_in_four(b)
        c0, c1, c2, c3 = _split_in_four(c)
        a0, a1, a2 = _by_byte(a0, a1, a2, PTX)
        a3, b0, b1 = _by_byte(a3, b0, b1, PTX)
        b2, b3, c0 = _by_byte(b2, b3, c0, PTX)
        c1, c2, c3 = _by_byte(c1, c2, c3, PTX)
        return _merge_four(a0, a3, b2, c1), _merge_four(a1, b0, b3, c2), _merge_four(a2, b1, c0, c3)
    word = WORDS * tile + j
    w = tl.load(codes + word[None, :], mask=n_mask & (word < used)[None, :], other=0)
    return w, w, w


@triton.jit
def four_codes(w0, w1, w2, SHIFT: tl.constexpr, BITS: tl.constexpr):
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
def float_code(four, BYTE: tl.constexpr, PTX: tl.constexpr):
    """The code in one byte, float32."""
    code = _pick_bytes(four, _ONES, 0x7440 + BYTE) if PTX else ((four >> (8 * BYTE)) & 0xF) | _ONES
    return code.to(tl.float32, bitcast=True) - _ONES_BASE


@triton.jit
def _plane(w0, w1, w2, SHIFT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The codes at one shift, ``[BLOCK_OUT, 4 * WORDS]`` of the activations' dtype and in their order."""
    four = four_codes(w0, w1, w2, SHIFT, BITS)
    if tl.int8 == DTYPE:
        b0, b1, b2, b3 = four.to(tl.int8), (four >> 8).to(tl.int8), (four >> 16).to(tl.int8), (four >> 24).to(tl.int8)
        return _merge_four(b0, b1, b2, b3)
    # Exact in every dtype: a code has at most four bits.
    f0, f1 = float_code(four, 0, PTX).to(DTYPE), float_code(four, 1, PTX).to(DTYPE)
    f2, f3 = float_code(four, 2, PTX).to(DTYPE), float_code(four, 3, PTX).to(DTYPE)
    return _side_by_side(_side_by_side(f0, f1), _side_by_side(f2, f3))


@triton.jit
def planes(
    w0, w1, w2, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """The codes at several shifts, side by side."""
    if COUNT == 1:
        return _plane(w0, w1, w2, FIRST, BITS, DTYPE, PTX)
    else:  # noqa: RET505  # what follows a return is compiled too, here without end
        HALF: tl.constexpr = COUNT // 2
        left = planes(w0, w1, w2, FIRST, HALF, BITS, DTYPE, PTX)
        return _side_by_side(left, planes(w0, w1, w2, FIRST + HALF, HALF, BITS, DTYPE, PTX))
