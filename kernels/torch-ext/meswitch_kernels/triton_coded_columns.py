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

from .triton_codes import codes_in_place, four_codes
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
from .triton_warp import begin_loads, load_four_words, load_word, multiply_bytes, wait_for_loads

__all__ = ["coded_columns"]


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
                tl.broadcast_to(a0, SHAPE),
                tl.broadcast_to(a1, SHAPE),
                tl.broadcast_to(a2, SHAPE),
                tl.broadcast_to(a3, SHAPE),
                tl.broadcast_to(xs[4 * i + 2 * pair], SHAPE),
                tl.broadcast_to(xs[4 * i + 2 * pair + 1], SHAPE),
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
        top: addresses of each thread's rows of codes, ``[1, m, threads]``; ``bottom`` those eight rows on.
        used: words of a row.
        x: addresses of the activations that a thread meets, ``[column tiles, 1, threads]``.
        scale_0: addresses of the scales of the columns of which a thread holds sums; ``scale_1`` of the columns after.
        weight: what these columns count, of that shape.
        sharer: which of those that share its output channels a warp is, ``[1, 1, threads]``.
        fourth: which of four threads with the same rows a thread is.
        tiles: scales of a row of activations.
    """
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    WORDS: tl.constexpr = BLOCK_CODES // (4 * SHIFTS)
    PARTS: tl.constexpr = WORDS // PART
    SHAPE: tl.constexpr = (x.shape[0], top.shape[1], x.shape[2])
    # Shifts of which a thread has the activations at a time: those of eight column tiles are as many as fit.
    CHUNK: tl.constexpr = min(SHIFTS, 8 // x.shape[0])
    # Masking codes where they are is half the work of shifting them, too, and worth making up for in few sums.
    IN_PLACE: tl.constexpr = x.shape[0] == 1 and BITS != 3
    UNIT: tl.constexpr = 1 << (8 - BITS) if IN_PLACE else 1
    parts = count_parts(used, BITS)
    zeros = tl.zeros(SHAPE, tl.int32)
    total_0 = tl.zeros(SHAPE, tl.float32)
    total_1 = tl.zeros(SHAPE, tl.float32)
    total_2 = tl.zeros(SHAPE, tl.float32)
    total_3 = tl.zeros(SHAPE, tl.float32)
    # The words of the next part are on their way while those of this one are worked on.
    next_top = load_part(top, sharer, fourth, used, BITS, PTX)
    next_bottom = load_part(bottom, sharer, fourth, used, BITS, PTX)
    wait_for_previous(OVERLAP)
    for turn in range(tl.cdiv(parts, SHARERS)):
        part = turn * SHARERS + sharer
        top_words = regrouped(next_top, BITS, PTX)
        bottom_words = regrouped(next_bottom, BITS, PTX)
        place = tl.minimum(part, parts - 1)
        tile = place // PARTS
        here = x + (tile * BLOCK_CODES + place % PARTS * (4 * PART)).to(tl.uint32).to(tl.int64)
        sums = (zeros, zeros, zeros, zeros)
        for shift in tl.static_range(0, SHIFTS - CHUNK, CHUNK):
            xs, loaded = _load_shifts(here, shift, CHUNK, 4 * WORDS, PTX)
            sums = _multiply_shifts(sums, top_words, bottom_words, xs, shift, CHUNK, BITS, IN_PLACE, PTX)
        xs, loaded = _load_shifts(here, SHIFTS - CHUNK, CHUNK, 4 * WORDS, PTX)
        unit_0 = load_word(scale_0 + tile * 4, PTX)
        unit_1 = load_word(scale_1 + tile * 4, PTX)
        loaded |= unit_0 | unit_1
        wait_for_loads(loaded, here, tiles, PTX)
        next_top = load_part(top, part + SHARERS, fourth, used, BITS, PTX)
        next_bottom = load_part(bottom, part + SHARERS, fourth, used, BITS, PTX)
        begin_loads(sharer, PTX)
        sums = _multiply_shifts(sums, top_words, bottom_words, xs, SHIFTS - CHUNK, CHUNK, BITS, IN_PLACE, PTX)
        # What is beyond the last part counts nothing.
        own_weight = tl.where(part < parts, weight * (1.0 / UNIT), 0.0)
        unit_0 = unit_0.to(tl.float32, bitcast=True) * own_weight
        unit_1 = unit_1.to(tl.float32, bitcast=True) * own_weight
        total_0 += sums[0].to(tl.float32) * unit_0
        total_1 += sums[1].to(tl.float32) * unit_1
        total_2 += sums[2].to(tl.float32) * unit_0
        total_3 += sums[3].to(tl.float32) * unit_1
    return total_0, total_1, total_2, total_3


@triton.jit
def coded_columns(
    codes, row_words, used, bits, n, n_mask, values, scale, offset, first, last, tiles,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr,
    WARPS: tl.constexpr, SHARERS: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Levels times activations, summed over the codes: float32 ``[BLOCK_ROWS, BLOCK_OUT]``.

    Args:
        codes: pointer to an expert's codes of ``bits``, whose rows are ``row_words`` words apart and have ``used``,
            a multiple of four, but not none.
        n: the rows of codes of the block ``[BLOCK_OUT]``; ``n_mask`` those that exist.
        values: pointer to the activations; ``scale`` and ``offset`` belong to them.
        first: the first of the positions, and ``last`` the one after the last: rows beyond it are like the last.
        tiles: scales of a position.
        BLOCK_ROWS: rows, of which a matrix has eight columns, or with two planes four rows' columns.
        WARPS: warps of the program.
        SHARERS: warps that share output channels.
    """
    COLUMN_TILES: tl.constexpr = BLOCK_ROWS * PLANES // 8
    sharer, eighth, fourth = lanes(BLOCK_OUT, WARPS, SHARERS)
    top, bottom = rows_of_codes(codes, row_words, n, n_mask, SHARERS, WARPS)

    # As of a matrix of activations a thread holds column `eighth`, and of the sums, `2 * fourth` and the one after.
    block = tl.arange(0, COLUMN_TILES)[:, None, None] * 8
    column = block + eighth
    position = position_of(column % BLOCK_ROWS, first, last)
    x = values.to(tl.int64) + (position * PLANES + column // BLOCK_ROWS) * (tiles * BLOCK_CODES)
    x += 16 * fourth
    column = block + 2 * fourth
    scale_0 = scale.to(tl.int64) + position_of(column % BLOCK_ROWS, first, last) * tiles * 4
    scale_1 = scale.to(tl.int64) + position_of((column + 1) % BLOCK_ROWS, first, last) * tiles * 4
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

    columns = gathered(total_0, total_1, total_2, total_3, BLOCK_OUT, SHARERS)
    total = tl.sum(columns.reshape(PLANES, BLOCK_ROWS, BLOCK_OUT), axis=0)
    return levels_of(total, bits, offset, first, last, tiles)
