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
from .triton_codes import dp4a, float_code, four_codes, load_words, planes
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


@triton.jit
def _codes_of(entry, bits, salient_channels, in_features, n):
    """Pointers to the rows of codes of some output channels ``[BLOCK_OUT, 1]``, and the words that a row has."""
    codes = tl.multiple_of(tl.load(entry + _CODES).to(tl.pointer_type(tl.int32)), 16)
    row_words = tl.multiple_of(tl.load(entry + _ROW_BYTES) >> 2, 4)
    # In whole vectors of four words, which rows are padded to.
    used = tl.multiple_of(tl.cdiv((in_features - salient_channels) * bits, 128) * 4, 4)
    return codes + n.to(tl.int64)[:, None] * row_words, used


@triton.jit
def _step_and_bias(entry, n, n_mask):
    """Step sizes, and the bias difference or zero, of some output channels: float32 ``[BLOCK_OUT]``."""
    step = tl.load(tl.load(entry + _STEP).to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)
    address = tl.load(entry + _BIAS)
    bias = tl.zeros_like(step)
    if address != 0:
        bias = tl.load(address.to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)
    return step, bias


@triton.jit
def _coded_row(
    codes, used, n_mask, x, scale, offset, low_plane, tiles,
    BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr,
    PART_WORDS: tl.constexpr, PTX: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Levels times activations of one row, summed over the codes: float32 ``[BLOCK_OUT]``."""
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    WORDS: tl.constexpr = BLOCK_CODES // (4 * SHIFTS)
    # Fewer activations at a time than a program has threads: then each thread loads those that belong to its codes,
    # and they need not be handed around through shared memory.
    PART: tl.constexpr = min(WORDS, PART_WORDS)
    j = tl.arange(0, PART)
    total = tl.zeros((BLOCK_OUT, PART), tl.float32)
    for tile in tl.range(tiles, loop_unroll_factor=UNROLL):
        high = tl.zeros((BLOCK_OUT, PART), tl.int32)
        low = tl.zeros((BLOCK_OUT, PART), tl.int32)
        for part in tl.static_range(WORDS // PART):
            w0, w1, w2 = load_words(codes, tile * (WORDS // PART) + part, used, n_mask, PART, BITS, PTX)
            here = x + tile * BLOCK_CODES
            for shift in tl.static_range(SHIFTS):
                four = four_codes(w0, w1, w2, shift, BITS)
                if PLANES == 0:
                    for byte in tl.static_range(4):
                        xs = tl.load(here + (4 * shift + byte) * WORDS + part * PART + j)
                        total += float_code(four, byte, PTX) * xs[None, :]
                else:
                    where = here.to(tl.pointer_type(tl.int32)) + shift * WORDS + part * PART + j
                    xs = tl.broadcast_to(tl.load(where)[None, :], (BLOCK_OUT, PART))
                    high = dp4a(four, xs, high, PTX)
                    if PLANES == 2:
                        xs = tl.broadcast_to(tl.load(where + low_plane // 4)[None, :], (BLOCK_OUT, PART))
                        low = dp4a(four, xs, low, PTX)
        if PLANES == 2:
            high = high * 256 + low
        if PLANES > 0:
            total += high.to(tl.float32) * tl.load(scale + tile)
    # A level is less than its code by the same for all, so the sum of the activations suffices.
    sums = tl.zeros((), tl.float32)
    for tile in range(tiles):
        sums += tl.load(offset + tile)
    return tl.sum(total, axis=1) - ((1 << BITS) - 1) * 0.5 * sums


@triton.jit
def _coded_rows(
    codes, used, n_mask, x, scale, offset, low_plane, mask, tiles,
    BITS: tl.constexpr, PLANES: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_CODES: tl.constexpr, PTX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same of several rows, on tensor cores: float32 ``[BLOCK_ROWS, BLOCK_OUT]``; zero where masked."""
    SHIFTS: tl.constexpr = 8 if BITS % 2 else 8 // BITS
    WORDS: tl.constexpr = BLOCK_CODES // (4 * SHIFTS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    here = x[:, None] + tl.arange(0, BLOCK_CODES)[None, :]
    for tile in tl.range(tiles, num_stages=STAGES):
        w0, w1, w2 = load_words(codes, tile, used, n_mask, WORDS, BITS, PTX)
        code = planes(w0, w1, w2, 0, SHIFTS, BITS, DTYPE, PTX).trans()
        xs = tl.load(here + tile * BLOCK_CODES, mask=mask[:, None], other=0)
        if PLANES == 0:
            total = dot(xs.to(DTYPE), code, total)
        else:
            product = tl.dot(xs, code, out_dtype=tl.int32)
            if PLANES == 2:
                xs = tl.load(here + low_plane + tile * BLOCK_CODES, mask=mask[:, None], other=0)
                product = product * 256 + tl.dot(xs, code, out_dtype=tl.int32)
            total += product.to(tl.float32) * tl.load(scale + tile, mask=mask, other=0.0)[:, None]
        sums += tl.load(offset + tile, mask=mask, other=0.0)
    return total - ((1 << BITS) - 1) * 0.5 * sums[:, None]


@triton.jit
def delta_of_row(
    x, in_features, table, expert, position, row, values, scale, offset, rows, tiles, n, n_mask,
    PLANES: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr, PART_WORDS: tl.constexpr,
    PTX: tl.constexpr, UNROLL: tl.constexpr,
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
        codes, used = _codes_of(entry, bits, salient_channels, in_features, n)
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
                1, PLANES, BLOCK_OUT, BLOCK_CODES, PART_WORDS, PTX, UNROLL,
            )  # fmt: skip
        elif bits == 2:
            delta = _coded_row(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, tiles,
                2, PLANES, BLOCK_OUT, BLOCK_CODES, PART_WORDS, PTX, UNROLL,
            )  # fmt: skip
        elif bits == 3:
            delta = _coded_row(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, tiles,
                3, PLANES, BLOCK_OUT, BLOCK_CODES, PART_WORDS, PTX, UNROLL,
            )  # fmt: skip
        else:
            delta = _coded_row(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, tiles,
                4, PLANES, BLOCK_OUT, BLOCK_CODES, PART_WORDS, PTX, UNROLL,
            )  # fmt: skip
        step, bias = _step_and_bias(entry, n, n_mask)
        delta = delta * step + bias
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
    return delta


@triton.jit
def delta_of_rows(
    x, in_features, table, expert, position, row, mask, values, scale, offset, rows, tiles, n, n_mask,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_CODES: tl.constexpr,
    PTX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for several rows of one expert: float32 ``[BLOCK_ROWS, BLOCK_OUT]``; zero for rows that are masked.

    ``position`` and ``row`` are ``[BLOCK_ROWS]``.
    """
    delta = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    entry = table + tl.maximum(expert, 0).to(tl.int64) * _COLUMNS
    bits = tl.where(expert >= 0, tl.load(entry + _BITS), 0).to(tl.int32)
    if bits > 0:
        salient_channels = tl.load(entry + _SALIENT_CHANNELS).to(tl.int32)
        codes, used = _codes_of(entry, bits, salient_channels, in_features, n)
        place = position.to(tl.int64)
        width = tiles * BLOCK_CODES
        x_here = values + place * width
        low_plane = tl.cast(rows, tl.int64) * width
        scale_here, offset_here = scale + place * tiles, offset + place * tiles
        DTYPE: tl.constexpr = x.dtype.element_ty if PLANES == 0 else tl.int8
        if bits == 1:
            delta = _coded_rows(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, mask, tiles,
                1, PLANES, DTYPE, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, PTX, STAGES,
            )  # fmt: skip
        elif bits == 2:
            delta = _coded_rows(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, mask, tiles,
                2, PLANES, DTYPE, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, PTX, STAGES,
            )  # fmt: skip
        elif bits == 3:
            delta = _coded_rows(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, mask, tiles,
                3, PLANES, DTYPE, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, PTX, STAGES,
            )  # fmt: skip
        else:
            delta = _coded_rows(
                codes, used, n_mask[:, None], x_here, scale_here, offset_here, low_plane, mask, tiles,
                4, PLANES, DTYPE, BLOCK_ROWS, BLOCK_OUT, BLOCK_CODES, PTX, STAGES,
            )  # fmt: skip
        step, bias = _step_and_bias(entry, n, n_mask)
        delta = delta * step[None, :] + bias[None, :]
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
        delta = tl.where(mask[:, None], delta, 0.0)
    return delta
