"""Packed codes in registers: words of them, four at a time in the bytes of a word, or all of a tile as a matrix.

The functions are Triton's and are inlined. ``PTX`` says that NVIDIA's instructions may be used; else the same
arithmetic is spelled out. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "as_operand",
    "by_byte",
    "codes_in_place",
    "dp4a",
    "float_code",
    "four_codes",
    "load_words",
    "planes",
    "regroup",
    "split_in_four",
]

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
def split_in_four(words):
    """``[..., 4 * columns]``, of two dimensions or three, to the four ``[..., columns]`` that are neighbours in it."""
    COLUMNS: tl.constexpr = words.shape[len(words.shape) - 1] // 4
    if len(words.shape) == 3:
        pairs = words.reshape(words.shape[0], words.shape[1], COLUMNS, 2, 2)
    else:
        pairs = words.reshape(words.shape[0], COLUMNS, 2, 2)
    even, odd = tl.split(pairs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _merge_four(first, second, third, fourth):
    """Undo :func:`split_in_four`."""
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
def regroup(w0, w1, w2, PTX: tl.constexpr):
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
def load_words(codes, tile, used, WORDS: tl.constexpr, BITS: tl.constexpr):
    """The words of a tile as memory has them, int32 ``[rows, WORDS]``; with three bits, three times as many in three.

    ``codes`` are the rows' pointers ``[rows, 1]``, or with one more dimension in front, which the words then have too;
    ``used`` is how many words a row has, a multiple of four. What lies beyond is not read and not set, for nothing
    multiplies it but zeros.
    """
    j = tl.arange(0, WORDS)
    if BITS == 3:
        # Twelve words are four groups of three. Three loads of four neighbouring words each are wide loads.
        word = 3 * WORDS * tile + (j // 4) * 12 + j % 4
        return _load(codes, word, used), _load(codes, word + 4, used), _load(codes, word + 8, used)
    w = _load(codes, WORDS * tile + j, used)
    return w, w, w


@triton.jit
def _load(codes, word, used):
    word = word[None, None, :] if len(codes.shape) == 3 else word[None, :]
    # Past the first cache, in which the activations stay.
    return tl.load(codes + word, mask=word < used, cache_modifier=".cg")


@triton.jit
def by_byte(a, b, c, BITS: tl.constexpr, PTX: tl.constexpr):
    """Loaded words as :func:`four_codes` takes them: with three bits, as :func:`regroup` has them."""
    if BITS != 3:
        return a, b, c
    COLUMNS: tl.constexpr = a.shape[len(a.shape) - 1]
    ROWS: tl.constexpr = a.numel // COLUMNS
    a0, a1, a2, a3 = split_in_four(a.reshape(ROWS, COLUMNS))
    b0, b1, b2, b3 = split_in_four(b.reshape(ROWS, COLUMNS))
    c0, c1, c2, c3 = split_in_four(c.reshape(ROWS, COLUMNS))
    a0, a1, a2 = regroup(a0, a1, a2, PTX)
    a3, b0, b1 = regroup(a3, b0, b1, PTX)
    b2, b3, c0 = regroup(b2, b3, c0, PTX)
    c1, c2, c3 = regroup(c1, c2, c3, PTX)
    w0, w1, w2 = _merge_four(a0, a3, b2, c1), _merge_four(a1, b0, b3, c2), _merge_four(a2, b1, c0, c3)
    return w0.reshape(a.shape), w1.reshape(a.shape), w2.reshape(a.shape)


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
def codes_in_place(w, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The codes at one shift, one in each byte, where they are: ``1 << BITS * SHIFT`` times what they stand for.

    Of one, two or four bits. Masking is half of what shifting and masking is, and the integer units are what the
    kernels wait for.
    """
    MASK: tl.constexpr = (((1 << BITS) - 1) << (BITS * SHIFT)) * 0x01010101
    return w & (MASK if MASK < (1 << 31) else MASK - (1 << 32))


@triton.jit
def float_code(four, BYTE: tl.constexpr, PTX: tl.constexpr):
    """The code in one byte, float32."""
    code = _pick_bytes(four, _ONES, 0x7440 + BYTE) if PTX else ((four >> (8 * BYTE)) & 0xF) | _ONES
    return code.to(tl.float32, bitcast=True) - _ONES_BASE


@triton.jit
def as_operand(values, SEGMENTS: tl.constexpr):
    """``[rows, columns]`` with the columns of each segment in the order in which tensor cores take an operand.

    A thread reads four neighbouring words, but of an operand it owns one or two of every four or eight: the order of a
    sum is free, so what a thread has read is put where it is wanted, and nothing goes through shared memory. A segment
    is a shift and byte.
    """
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    UNIT: tl.constexpr = 64 // values.dtype.primitive_bitwidth
    apart = values.reshape(ROWS, SEGMENTS, COLUMNS // SEGMENTS // 4, 4 // UNIT, UNIT)
    return apart.permute(0, 1, 3, 2, 4).reshape(ROWS, COLUMNS)


@triton.jit
def _plane(w0, w1, w2, SHIFT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The codes at one shift, ``[rows, 4 * words]`` of the activations' dtype and in their order."""
    four = four_codes(w0, w1, w2, SHIFT, BITS)
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
