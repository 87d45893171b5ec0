"""An expert's codes times rows of activations in bytes, on tensor cores.

Each warp of a program has output channels to itself, or shares them with others and has parts of their codes: there is
no barrier before the end. What a thread has read of codes it multiplies by, a byte a code, and nothing is moved: the
order of a sum is free, so the activations were laid out as the codes lie in memory
(:mod:`~meswitch_kernels.triton_activations`). A matrix of activations has eight columns; of 16-bit ones the high and
the low bytes are a column each. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_codes import codes_in_place, four_codes, regroup
from .triton_grids import wait_for_previous
from .triton_warp import begin_loads, load_four_words, load_word, multiply_bytes, spread_rows, wait_for_loads

__all__ = ["coded_columns"]

#: Words of a row, or groups of three with three bits, in a part: four of each of four threads.
_PART = tl.constexpr(16)
#: Offsets of activations that are summed at a time.
_BLOCK_TILES = tl.constexpr(16)


@triton.jit
def _load_part(rows, part, fourth, used, BITS: tl.constexpr, PTX: tl.constexpr):
    """A thread's words of a part of each of its rows: four, or twelve with three bits.

    Beyond those that are used the last ones are read again, which meet zeros.
    """
    WIDTH: tl.constexpr = 12 if BITS == 3 else 4
    word = (4 * part + fourth) * WIDTH
    words = ()
    for vector in tl.static_range(WIDTH // 4):
        byte = tl.minimum(word + 4 * vector, used - 4) * 4
        words += load_four_words(rows + byte.to(tl.uint32).to(tl.int64)[None, :], False, PTX)
    return words


@triton.jit
def _regrouped(words, BITS: tl.constexpr, PTX: tl.constexpr):
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
def _load_shifts(address, FIRST: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr, PTX: tl.constexpr):
    """What a part's words meet at some shifts, four words each; and something of each load, to wait for."""
    words = load_four_words(address + FIRST * STRIDE, True, PTX)
    loaded = words[0]
    for shift in tl.static_range(FIRST + 1, FIRST + COUNT):
        more = load_four_words(address + shift * STRIDE, True, PTX)
        loaded |= more[0]
        words += more
    return words, loaded


@triton.jit
def _multiply_shifts(
    sums, top, bottom, xs, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, IN_PLACE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """``sums`` plus the codes of a part's words at some shifts times the activations that they meet, ``xs``.

    Codes in place are ``1 << BITS * shift`` times what they stand for; sums of earlier shifts are made as many times
    theirs.
    """
    SHAPE: tl.constexpr = sums[0].shape
    for i in tl.static_range(COUNT):
        if IN_PLACE and FIRST + i > 0:
            sums = (sums[0] << BITS, sums[1] << BITS, sums[2] << BITS, sums[3] << BITS)
        for pair in tl.static_range(2):
            if BITS == 3:
                a0 = four_codes(top[6 * pair], top[6 * pair + 1], top[6 * pair + 2], FIRST + i, BITS)
                a1 = four_codes(bottom[6 * pair], bottom[6 * pair + 1], bottom[6 * pair + 2], FIRST + i, BITS)
                a2 = four_codes(top[6 * pair + 3], top[6 * pair + 4], top[6 * pair + 5], FIRST + i, BITS)
                a3 = four_codes(bottom[6 * pair + 3], bottom[6 * pair + 4], bottom[6 * pair + 5], FIRST + i, BITS)
            elif IN_PLACE:
                a0 = codes_in_place(top[2 * pair], FIRST + i, BITS)
                a1 = codes_in_place(bottom[2 * pair], FIRST + i, BITS)
                a2 = codes_in_place(top[2 * pair + 1], FIRST + i, BITS)
                a3 = codes_in_place(bottom[2 * pair + 1], FIRST + i, BITS)
            else:
                a0 = four_codes(top[2 * pair], top[2 * pair], top[2 * pair], FIRST + i, BITS)
                a1 = four_codes(bottom[2 * pair], bottom[2 * pair], bottom[2 * pair], FIRST + i, BITS)
                a2 = four_codes(top[2 * pair + 1], top[2 * pair + 1], top[2 * pair + 1], FIRST + i, BITS)
                a3 = four_codes(bottom[2 * pair + 1], bottom[2 * pair + 1], bottom[2 * pair + 1], FIRST + i, BITS)
            sums = multiply_bytes(
                tl.broadcast_to(a0[None], SHAPE),
                tl.broadcast_to(a1[None], SHAPE),
                tl.broadcast_to(a2[None], SHAPE),
                tl.broadcast_to(a3[None], SHAPE),
                tl.broadcast_to(xs[4 * i + 2 * pair][:, None], SHAPE),
                tl.broadcast_to(xs[4 * i + 2 * pair + 1][:, None], SHAPE),
                sums[0], sums[1], sums[2], sums[3],
                PTX,
            )  # fmt: skip
    return sums


@triton.jit
def _sum_parts(
    top, bottom, used, x, scale_0, scale_1, weight, sharer, fourth, tiles,
    BITS: tl.constexpr, BLOCK_CODES: tl.constexpr, SHARERS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Codes times activations of each warp's parts, as a warp holds sums: four float32 ``[column tiles, m, threads]``.

    Args:
        top: addresses of each thread's rows of codes, ``[m, threads]``; ``bottom`` those eight rows on.
        used: words of a row.
        x: addresses of the activations that a thread meets, ``[column tiles, threads]``.
        scale_0: addresses of the scales of the columns of which a thread holds sums; ``scale_1`` of the columns after.
        weight: what these columns count, of that shape.
        sharer: which of those that share its output channels a warp is, ``[threads]``.
        fourth: which of four threads with the same rows a thread is.
        tiles: scales of a row of activations.
    """
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    WORDS: tl.constexpr = BLOCK_CODES // (4 * SHIFTS)
    PARTS: tl.constexpr = WORDS // _PART
    SHAPE: tl.constexpr = (x.shape[0], top.shape[0], x.shape[1])
    # Shifts of which a thread has the activations at a time: those of eight column tiles are as many as fit.
    CHUNK: tl.constexpr = min(SHIFTS, 8 // x.shape[0])
    # Masking codes where they are is half the work of shifting them, too, and worth making up for in few sums.
    IN_PLACE: tl.constexpr = x.shape[0] == 1 and BITS != 3
    UNIT: tl.constexpr = 1 << (8 - BITS) if IN_PLACE else 1
    parts = tl.cdiv(used, 3 * _PART if BITS == 3 else _PART)
    zeros = tl.zeros(SHAPE, tl.int32)
    total_0 = tl.zeros(SHAPE, tl.float32)
    total_1 = tl.zeros(SHAPE, tl.float32)
    total_2 = tl.zeros(SHAPE, tl.float32)
    total_3 = tl.zeros(SHAPE, tl.float32)
    # The words of the next part are on their way while those of this one are worked on.
    next_top = _load_part(top, sharer, fourth, used, BITS, PTX)
    next_bottom = _load_part(bottom, sharer, fourth, used, BITS, PTX)
    wait_for_previous(OVERLAP)
    for turn in range(tl.cdiv(parts, SHARERS)):
        part = turn * SHARERS + sharer
        top_words = _regrouped(next_top, BITS, PTX)
        bottom_words = _regrouped(next_bottom, BITS, PTX)
        place = tl.minimum(part, parts - 1)
        tile = place // PARTS
        here = x + (tile * BLOCK_CODES + place % PARTS * (4 * _PART)).to(tl.uint32).to(tl.int64)[None, :]
        sums = (zeros, zeros, zeros, zeros)
        for shift in tl.static_range(0, SHIFTS - CHUNK, CHUNK):
            xs, loaded = _load_shifts(here, shift, CHUNK, 4 * WORDS, PTX)
            sums = _multiply_shifts(sums, top_words, bottom_words, xs, shift, CHUNK, BITS, IN_PLACE, PTX)
        xs, loaded = _load_shifts(here, SHIFTS - CHUNK, CHUNK, 4 * WORDS, PTX)
        unit_0 = load_word(scale_0 + (tile * 4)[None, :], PTX)
        unit_1 = load_word(scale_1 + (tile * 4)[None, :], PTX)
        loaded |= unit_0 | unit_1
        wait_for_loads(loaded, here, tiles, PTX)
        next_top = _load_part(top, part + SHARERS, fourth, used, BITS, PTX)
        next_bottom = _load_part(bottom, part + SHARERS, fourth, used, BITS, PTX)
        begin_loads(sharer, PTX)
        sums = _multiply_shifts(sums, top_words, bottom_words, xs, SHIFTS - CHUNK, CHUNK, BITS, IN_PLACE, PTX)
        # What is beyond the last part counts nothing.
        own_weight = tl.where((part < parts)[None, :], weight * (1.0 / UNIT), 0.0)
        unit_0 = (unit_0.to(tl.float32, bitcast=True) * own_weight)[:, None]
        unit_1 = (unit_1.to(tl.float32, bitcast=True) * own_weight)[:, None]
        total_0 += sums[0].to(tl.float32) * unit_0
        total_1 += sums[1].to(tl.float32) * unit_1
        total_2 += sums[2].to(tl.float32) * unit_0
        total_3 += sums[3].to(tl.float32) * unit_1
    return total_0, total_1, total_2, total_3


@triton.jit
def _position(row, first, last):
    """Where a row is among those from ``first`` to ``last``; rows beyond are where the last one is."""
    return tl.minimum(first + row, last - 1).to(tl.int64)


@triton.jit
def coded_columns(
    codes, row_words, used, bits, n, n_mask, values, scale, offset, low_plane, first, last, tiles,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr,
    WARPS: tl.constexpr, SHARERS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Levels times activations, summed over the codes: float32 ``[BLOCK_ROWS, BLOCK_OUT]``.

    Args:
        codes: pointer to an expert's codes of ``bits``, whose rows are ``row_words`` words apart and have ``used``,
            a multiple of four, but not none.
        n: the rows of codes of the block ``[BLOCK_OUT]``; ``n_mask`` those that exist.
        values: pointer to the activations; ``scale`` and ``offset`` belong to them, and ``low_plane`` is how many
            bytes the low ones are from the high ones.
        first: the first of the positions, and ``last`` the one after the last: rows beyond it are like the last.
        tiles: scales of a position.
        BLOCK_ROWS: rows, of which a matrix has eight columns, or with two planes four rows' columns.
        WARPS: warps of the program.
        SHARERS: warps that share output channels.
    """
    THREADS: tl.constexpr = 32 * WARPS
    OWNERS: tl.constexpr = WARPS // SHARERS
    OUT_TILES: tl.constexpr = BLOCK_OUT // 16 // OWNERS
    COLUMN_TILES: tl.constexpr = BLOCK_ROWS * PLANES // 8
    tl.static_assert(
        WARPS % SHARERS == 0 and BLOCK_OUT % (16 * OWNERS) == 0, "a warp has a share of 16 channels or more"
    )
    thread = tl.arange(0, THREADS)
    sharer, eighth, fourth = thread // 32 % SHARERS, (thread % 32) // 4, thread % 4

    # Rows that do not exist read another's codes.
    top, bottom = spread_rows(tl.where(n_mask, n, 0), SHARERS, WARPS)
    top = codes.to(tl.int64) + top.to(tl.int64) * (row_words * 4)
    bottom = codes.to(tl.int64) + bottom.to(tl.int64) * (row_words * 4)

    # As of a matrix of activations a thread holds column `eighth`, and of the sums, `2 * fourth` and the one after.
    block = tl.arange(0, COLUMN_TILES)[:, None] * 8
    column = block + eighth[None, :]
    position = _position(column % BLOCK_ROWS, first, last)
    x = values.to(tl.int64) + (column // BLOCK_ROWS) * low_plane + position * (tiles * BLOCK_CODES)
    x += 16 * fourth[None, :]
    column = block + 2 * fourth[None, :]
    scale_0 = scale.to(tl.int64) + _position(column % BLOCK_ROWS, first, last) * tiles * 4
    scale_1 = scale.to(tl.int64) + _position((column + 1) % BLOCK_ROWS, first, last) * tiles * 4
    weight = tl.where(column < (PLANES - 1) * BLOCK_ROWS, 256.0, 1.0)

    # One kernel for all numbers of bits, as of one row: a branch a block, which is uniform.
    if bits == 1:
        total_0, total_1, total_2, total_3 = _sum_parts(
            top, bottom, used, x, scale_0, scale_1, weight, sharer, fourth, tiles,
            1, BLOCK_CODES, SHARERS, PTX, OVERLAP,
        )  # fmt: skip
    elif bits == 2:
        total_0, total_1, total_2, total_3 = _sum_parts(
            top, bottom, used, x, scale_0, scale_1, weight, sharer, fourth, tiles,
            2, BLOCK_CODES, SHARERS, PTX, OVERLAP,
        )  # fmt: skip
    elif bits == 3:
        total_0, total_1, total_2, total_3 = _sum_parts(
            top, bottom, used, x, scale_0, scale_1, weight, sharer, fourth, tiles,
            3, BLOCK_CODES, SHARERS, PTX, OVERLAP,
        )  # fmt: skip
    else:
        total_0, total_1, total_2, total_3 = _sum_parts(
            top, bottom, used, x, scale_0, scale_1, weight, sharer, fourth, tiles,
            4, BLOCK_CODES, SHARERS, PTX, OVERLAP,
        )  # fmt: skip

    both = tl.join(tl.join(total_0, total_1), tl.join(total_2, total_3))
    both = tl.sum(both.reshape(COLUMN_TILES * OUT_TILES * OWNERS, SHARERS, 32 * 4), axis=1)
    # Column tile, output tile, owner, eighth, fourth, odd column, lower half.
    both = both.reshape(COLUMN_TILES, OUT_TILES, OWNERS, 8, 4, 2, 2).permute(0, 4, 5, 2, 1, 6, 3)
    total = tl.sum(both.reshape(PLANES, BLOCK_ROWS, BLOCK_OUT), axis=0)

    # A level is less than its code by the same for all, so the sum of the activations suffices.
    position = _position(tl.arange(0, BLOCK_ROWS), first, last)
    sums_of_tiles = tl.zeros((BLOCK_ROWS, _BLOCK_TILES), tl.float32)
    for begin in range(0, tiles, _BLOCK_TILES):
        tile = begin + tl.arange(0, _BLOCK_TILES)
        where = offset + position[:, None] * tiles + tile[None, :]
        sums_of_tiles += tl.load(where, mask=(tile < tiles)[None, :], other=0.0)
    return total - ((1 << bits) - 1).to(tl.float32) * 0.5 * tl.sum(sums_of_tiles, axis=1)[:, None]
