"""An expert's codes times rows of bfloat16 activations as they are, on tensor cores.

As in :mod:`~meswitch_kernels.triton_coded_columns` nothing that a thread has read is moved. Two codes of a word are
made two bfloat16 by a mask, which puts them into the fraction of 128, and one multiply-add, which takes that away.
So there is no scale to undo, and a sum for each row rather than for each byte of it. Importing this module needs
Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_codes import four_codes
from .triton_grids import wait_for_previous
from .triton_parts import (
    PART,
    count_parts,
    gathered,
    lanes,
    levels_of,
    load_part,
    position_of,
    regrouped,
    rows_of_codes,
)
from .triton_warp import begin_loads, load_four_words, multiply_floats, two_floats, wait_for_loads

__all__ = ["float_columns"]

#: Bytes of a bfloat16.
_SIZE = tl.constexpr(2)


@triton.jit
def _where(exists, words):
    """Words where they exist, and zeros."""
    kept = ()
    for i in tl.static_range(len(words)):
        kept += (tl.where(exists, words[i], 0),)  # type: ignore[assignment]  # tuples of Triton's grow
    return kept


@triton.jit
def _load_shift(address, shift, STRIDE: tl.constexpr, PTX: tl.constexpr):
    """What a part's words meet at a shift: of each of four words, the activations of bytes 0 and 2, and of 1 and 3."""
    low = load_four_words(address + shift * STRIDE, True, PTX)
    high = load_four_words(address + (shift * STRIDE + 16), True, PTX)
    return low + high


@triton.jit
def _pairs(words, WORD: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """The codes of a word of a part at a shift: those in bytes 0 and 2, and those in 1 and 3, two bfloat16 each."""
    if BITS == 3:
        four = four_codes(words[3 * WORD], words[3 * WORD + 1], words[3 * WORD + 2], SHIFT, BITS)
        return two_floats(four, 0, BITS, PTX), two_floats(four, 8, BITS, PTX)
    else:  # noqa: RET505  # what follows a return is compiled too
        return two_floats(words[WORD], BITS * SHIFT, BITS, PTX), two_floats(words[WORD], BITS * SHIFT + 8, BITS, PTX)


@triton.jit
def _multiply_shift(sums, top, bottom, xs, SHIFT: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """``sums`` plus the codes of a part's words at a shift times the activations that they meet, ``xs``."""
    SHAPE: tl.constexpr = sums[0].shape
    for i in tl.static_range(4):
        a0, a2 = _pairs(top, i, SHIFT, BITS, PTX)
        a1, a3 = _pairs(bottom, i, SHIFT, BITS, PTX)
        sums = multiply_floats(
            tl.broadcast_to(a0, SHAPE),
            tl.broadcast_to(a1, SHAPE),
            tl.broadcast_to(a2, SHAPE),
            tl.broadcast_to(a3, SHAPE),
            tl.broadcast_to(xs[2 * i], SHAPE),
            tl.broadcast_to(xs[2 * i + 1], SHAPE),
            sums[0], sums[1], sums[2], sums[3],
            PTX,
        )  # fmt: skip
    return sums


@triton.jit
def _sum_parts(
    top, bottom, used, x, sharer, fourth, tiles,
    BITS: tl.constexpr, BLOCK_CODES: tl.constexpr, SHARERS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Codes times activations of each warp's parts, as a warp holds sums: four float32 ``[column tiles, m, threads]``.

    Args:
        top: addresses of each thread's rows of codes, ``[1, m, threads]``; ``bottom`` those eight rows on.
        used: words of a row.
        x: addresses of the activations that a thread meets, ``[column tiles, 1, threads]``.
        sharer: which of those that share its output channels a warp is, ``[1, 1, threads]``.
        fourth: which of four threads with the same rows a thread is.
        tiles: of a row of activations.
    """
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    WORDS: tl.constexpr = BLOCK_CODES // (4 * SHIFTS)
    PARTS: tl.constexpr = WORDS // PART
    STRIDE: tl.constexpr = 4 * WORDS * _SIZE
    parts = count_parts(used, BITS)
    zeros = tl.zeros((x.shape[0], top.shape[1], x.shape[2]), tl.float32)
    sums = (zeros, zeros, zeros, zeros)
    # The words of the next part are on their way while those of this one are worked on.
    next_top = load_part(top, sharer, fourth, used, BITS, PTX)
    next_bottom = load_part(bottom, sharer, fourth, used, BITS, PTX)
    wait_for_previous(OVERLAP)
    for turn in range(tl.cdiv(parts, SHARERS)):
        part = turn * SHARERS + sharer
        # What is beyond the last part counts nothing: its codes are made zero.
        exists = part < parts
        top_words = regrouped(_where(exists, next_top), BITS, PTX)
        bottom_words = regrouped(_where(exists, next_bottom), BITS, PTX)
        place = tl.minimum(part, parts - 1)
        here = (place // PARTS * BLOCK_CODES + place % PARTS * (4 * PART)) * _SIZE
        here = x + here.to(tl.uint32).to(tl.int64)
        xs = _load_shift(here, 0, STRIDE, PTX)
        for shift in tl.static_range(SHIFTS - 1):
            next_xs = _load_shift(here, shift + 1, STRIDE, PTX)
            begin_loads(sharer, PTX)
            sums = _multiply_shift(sums, top_words, bottom_words, xs, shift, BITS, PTX)
            xs = next_xs
        wait_for_loads(xs[0] | xs[4], here, tiles, PTX)
        next_top = load_part(top, part + SHARERS, fourth, used, BITS, PTX)
        next_bottom = load_part(bottom, part + SHARERS, fourth, used, BITS, PTX)
        begin_loads(sharer, PTX)
        sums = _multiply_shift(sums, top_words, bottom_words, xs, SHIFTS - 1, BITS, PTX)
    return sums


@triton.jit
def float_columns(
    codes, row_words, used, bits, n, n_mask, values, offset, first, last, tiles,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr, WARPS: tl.constexpr,
    SHARERS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Levels times activations, summed over the codes: float32 ``[BLOCK_ROWS, BLOCK_OUT]``.

    Args:
        codes: pointer to an expert's codes of ``bits``, whose rows are ``row_words`` words apart and have ``used``,
            a multiple of four, but not none.
        n: the rows of codes of the block ``[BLOCK_OUT]``; ``n_mask`` those that exist.
        values: pointer to the activations, two bytes each; ``offset`` to the sums of their tiles.
        first: the first of the positions, and ``last`` the one after the last: rows beyond it are like the last.
        tiles: of a position.
        BLOCK_ROWS: rows, a multiple of eight.
        WARPS: warps of the program.
        SHARERS: warps that share output channels.
    """
    sharer, eighth, fourth = lanes(BLOCK_OUT, WARPS, SHARERS)
    top, bottom = rows_of_codes(codes, row_words, n, n_mask, SHARERS, WARPS)
    # As of a matrix of activations a thread holds column `eighth`.
    column = tl.arange(0, BLOCK_ROWS // 8)[:, None, None] * 8 + eighth
    x = values.to(tl.int64) + position_of(column, first, last) * (tiles * (BLOCK_CODES * _SIZE))
    x += 16 * _SIZE * fourth

    # One kernel for all numbers of bits, as of one row: a branch a block, which is uniform.
    if bits == 1:
        sum_0, sum_1, sum_2, sum_3 = _sum_parts(
            top, bottom, used, x, sharer, fourth, tiles, 1, BLOCK_CODES, SHARERS, PTX, OVERLAP
        )
    elif bits == 2:
        sum_0, sum_1, sum_2, sum_3 = _sum_parts(
            top, bottom, used, x, sharer, fourth, tiles, 2, BLOCK_CODES, SHARERS, PTX, OVERLAP
        )
    elif bits == 3:
        sum_0, sum_1, sum_2, sum_3 = _sum_parts(
            top, bottom, used, x, sharer, fourth, tiles, 3, BLOCK_CODES, SHARERS, PTX, OVERLAP
        )
    else:
        sum_0, sum_1, sum_2, sum_3 = _sum_parts(
            top, bottom, used, x, sharer, fourth, tiles, 4, BLOCK_CODES, SHARERS, PTX, OVERLAP
        )

    total = gathered(sum_0, sum_1, sum_2, sum_3, BLOCK_OUT, SHARERS)
    return levels_of(total, bits, offset, first, last, tiles)
