"""Parts of an expert's codes as the threads of warps read and own them, and what becomes of their sums.

A warp has output channels to itself, or shares them with others and has parts of their codes. The functions are
Triton's and are inlined. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_codes import regroup
from .triton_warp import load_four_words, spread_rows

__all__ = [
    "PART",
    "count_parts",
    "gathered",
    "lanes",
    "levels_of",
    "load_part",
    "position_of",
    "regrouped",
    "rows_of_codes",
]

#: Words of a row, or groups of three with three bits, in a part: four of each of four threads.
PART = tl.constexpr(16)
#: Offsets of activations that are summed at a time.
_BLOCK_TILES = tl.constexpr(16)


@triton.jit
def lanes(BLOCK_OUT: tl.constexpr, WARPS: tl.constexpr, SHARERS: tl.constexpr):
    """Of each thread: which its warp is of those that share channels, its eighth of it, and its place in that.

    ``[1, 1, threads]``, since all that a thread holds has the three dimensions of sums here. Each change of dimensions
    in a loop is a layout for Triton to reconcile, which of some thousand takes it a minute and a half.
    """
    OWNERS: tl.constexpr = WARPS // SHARERS
    tl.static_assert(
        WARPS % SHARERS == 0 and BLOCK_OUT % (16 * OWNERS) == 0, "a warp has a share of 16 channels or more"
    )
    thread = tl.arange(0, 32 * WARPS)[None, None, :]
    return thread // 32 % SHARERS, (thread % 32) // 4, thread % 4


@triton.jit
def count_parts(used, BITS: tl.constexpr):
    """Parts of a row of so many words."""
    return tl.cdiv(used, 3 * PART if BITS == 3 else PART)


@triton.jit
def load_part(rows, part, fourth, used, BITS: tl.constexpr, PTX: tl.constexpr):
    """A thread's words of a part of each of its rows: four, or twelve with three bits.

    Beyond those that are used the last ones are read again, which meet zeros.
    """
    WIDTH: tl.constexpr = 12 if BITS == 3 else 4
    word = (4 * part + fourth) * WIDTH
    words = ()
    for vector in tl.static_range(WIDTH // 4):
        byte = tl.minimum(word + 4 * vector, used - 4) * 4
        words += load_four_words(rows + byte.to(tl.uint32).to(tl.int64), False, PTX)
    return words


@triton.jit
def regrouped(words, BITS: tl.constexpr, PTX: tl.constexpr):
    """What :func:`four_codes` takes of each of a part's groups of three words; other words as they are."""
    if BITS == 3:
        return (
            regroup(words[0], words[1], words[2], PTX)
            + regroup(words[3], words[4], words[5], PTX)
            + regroup(words[6], words[7], words[8], PTX)
            + regroup(words[9], words[10], words[11], PTX)
        )
    else:  # noqa: RET505  # what follows a return is compiled too
        return words


@triton.jit
def position_of(row, first, last):
    """Where a row is among those from ``first`` to ``last``; rows beyond are where the last one is."""
    return tl.minimum(first + row, last - 1).to(tl.int64)


@triton.jit
def rows_of_codes(codes, row_words, n, n_mask, SHARERS: tl.constexpr, WARPS: tl.constexpr):
    """Addresses of a thread's rows of codes, int64 ``[1, m, threads]``: rows ``g``, and those eight on.

    Rows that do not exist read another's codes.
    """
    top, bottom = spread_rows(tl.where(n_mask, n, 0), SHARERS, WARPS)
    first = codes.to(tl.int64)
    top, bottom = top[None].to(tl.int64), bottom[None].to(tl.int64)
    return first + top * (row_words * 4), first + bottom * (row_words * 4)


@triton.jit
def gathered(sum_0, sum_1, sum_2, sum_3, BLOCK_OUT: tl.constexpr, SHARERS: tl.constexpr):
    """Sums ``[column tiles, m, threads]`` as warps hold them, added up over those that share output channels.

    Returns:
        Float32 ``[8 * column tiles, BLOCK_OUT]``.
    """
    COLUMN_TILES: tl.constexpr = sum_0.shape[0]
    OUT_TILES: tl.constexpr = sum_0.shape[1]
    OWNERS: tl.constexpr = sum_0.shape[2] // (32 * SHARERS)
    both = tl.join(tl.join(sum_0, sum_1), tl.join(sum_2, sum_3))
    both = tl.sum(both.reshape(COLUMN_TILES * OUT_TILES * OWNERS, SHARERS, 32 * 4), axis=1)
    # Column tile, output tile, owner, eighth, fourth, odd column, lower half.
    both = both.reshape(COLUMN_TILES, OUT_TILES, OWNERS, 8, 4, 2, 2).permute(0, 4, 5, 2, 1, 6, 3)
    return both.reshape(8 * COLUMN_TILES, BLOCK_OUT)


@triton.jit
def levels_of(total, bits, offset, first, last, tiles):
    """What codes times activations ``[BLOCK_ROWS, n]`` is of levels.

    A level is less than its code by the same for all, so the sum of the activations at each position suffices.
    """
    position = position_of(tl.arange(0, total.shape[0]), first, last)
    sums = tl.zeros((total.shape[0], _BLOCK_TILES), tl.float32)
    for begin in range(0, tiles, _BLOCK_TILES):
        tile = begin + tl.arange(0, _BLOCK_TILES)
        where = offset + position[:, None] * tiles + tile[None, :]
        sums += tl.load(where, mask=(tile < tiles)[None, :], other=0.0)
    return total - ((1 << bits) - 1).to(tl.float32) * 0.5 * tl.sum(sums, axis=1)[:, None]
