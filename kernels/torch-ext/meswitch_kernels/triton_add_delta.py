"""The Triton kernel that writes a weight plus an expert's delta. Importing this module needs Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .expert_table import COLUMNS

__all__ = ["AddSizes", "add_delta_triton"]

_COLUMNS = tl.constexpr(len(COLUMNS))
_CODES = tl.constexpr(COLUMNS.index("codes"))
_STEP = tl.constexpr(COLUMNS.index("step"))
_COLUMN_STEP = tl.constexpr(COLUMNS.index("column_step"))
_SALIENT_INDEX = tl.constexpr(COLUMNS.index("salient_index"))
_SALIENT = tl.constexpr(COLUMNS.index("salient"))
_BIAS = tl.constexpr(COLUMNS.index("bias"))
_BITS = tl.constexpr(COLUMNS.index("bits"))
_SALIENT_CHANNELS = tl.constexpr(COLUMNS.index("salient_channels"))
_ROW_BYTES = tl.constexpr(COLUMNS.index("row_bytes"))

#: Columns whose codes are taken out of one word: eight codes of four bits fill it, eight bfloat16 are the widest load.
_GROUP = tl.constexpr(8)


@dataclass(frozen=True)
class AddSizes:
    """How the kernel divides its work; all powers of two.

    Attributes:
        block_rows: output channels that a program has in registers at a time.
        block_columns: input channels of a program, 8 or more.
        tiles: times ``block_rows`` of a block, for which columns are prepared once.
        warps: warps of a program.
    """

    block_rows: int = 8
    block_columns: int = 256
    tiles: int = 4
    warps: int = 4


_DEFAULT = AddSizes()


@triton.jit
def _salient_before(column, salient_index, salient_channels):
    """How many salient channels lie before each column: binary search, int32 like ``column``."""
    before = tl.zeros_like(column)
    span = 1
    while span * 2 <= salient_channels:
        span = span * 2
    while span > 0:
        probe = before + span
        inside = probe <= salient_channels
        channel = tl.load(salient_index + probe - 1, mask=inside, other=0)
        before = tl.where(inside & (channel < column), probe, before)
        span = span // 2
    return before


@triton.jit
def _copy_block(
    out, weight, out_row, weight_row, out_column, weight_column, first_row, out_features, column_mask,
    BLOCK_ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """An empty slot: the weight bit for bit, which adding zero would not give where it is -0."""
    for tile in range(TILES):
        row = first_row + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < out_features)[:, None] & column_mask[None, :]
        long_row = row.to(tl.int64)[:, None]
        values = tl.load(weight + long_row * weight_row + weight_column[None, :], mask=mask, other=0.0)
        tl.store(out + long_row * out_row + out_column[None, :], values, mask=mask)


@triton.jit
def _add_block(
    out, weight, entry, bits, out_row, weight_row, out_column, weight_column, first_row, first_channel, out_features,
    in_features, column, column_mask, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A block of ``TILES * BLOCK_ROWS`` rows; ``column`` and what belongs to it are ``[BLOCK_COLUMNS]``.

    ``first_channel`` is the delta's output channel that belongs to row 0 of ``out`` and ``weight``, int64.
    """
    GROUPS: tl.constexpr = BLOCK_COLUMNS // _GROUP
    salient_channels = tl.load(entry + _SALIENT_CHANNELS).to(tl.int32)
    salient_index = tl.load(entry + _SALIENT_INDEX).to(tl.pointer_type(tl.int32))
    salient = tl.load(entry + _SALIENT).to(tl.pointer_type(tl.bfloat16)) + first_channel * salient_channels
    before = _salient_before(column, salient_index, salient_channels)
    following = tl.load(salient_index + before, mask=before < salient_channels, other=-1)
    first_salient = tl.min(before, axis=0)
    last_salient = first_salient + tl.sum((following == column).to(tl.int32), axis=0)
    coded = column - before

    address = tl.load(entry + _COLUMN_STEP)
    has_factor = (column < tl.where(address != 0, in_features, 0)) & (following != column)
    factor = tl.load(address.to(tl.pointer_type(tl.float32)) + coded, mask=has_factor, other=1.0)

    # Salient channels push the codes after them out of step with the columns, so a group's codes begin at any bit: two
    # words are shifted into one, from which all of the group's codes are taken, whatever their number of bits.
    first_code = tl.min(coded.reshape(GROUPS, _GROUP), axis=1)
    word = (first_code * bits) >> 5
    low_shift = ((first_code * bits) & 31).to(tl.uint32)[:, None]
    code_shift = (coded.reshape(GROUPS, _GROUP) - first_code[:, None]) * bits
    code_shift = code_shift.reshape(BLOCK_COLUMNS).to(tl.uint32)[None, :]
    code_mask = ((1 << bits) - 1).to(tl.uint32)
    middle = ((1 << bits) - 1).to(tl.float32) * 0.5
    # In whole vectors of four words, which rows are padded to.
    used = tl.cdiv((in_features - salient_channels) * bits, 128) * 4
    low_mask = (word < used)[:, None]
    high_mask = (word + 1 < used)[:, None]
    row_words = tl.load(entry + _ROW_BYTES) >> 2
    codes = tl.load(entry + _CODES).to(tl.pointer_type(tl.uint32)) + first_channel * row_words + word[:, None]
    step = tl.load(entry + _STEP).to(tl.pointer_type(tl.float32)) + first_channel

    for tile in range(TILES):
        row = first_row + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_mask = row < out_features
        long_row = row.to(tl.int64)
        mask = row_mask[:, None] & column_mask[None, :]
        source = weight + long_row[:, None] * weight_row + weight_column[None, :]
        total = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        # Groups come before rows, since Triton lets neighbouring threads take the first of two equal dimensions.
        here = codes + long_row[None, :] * row_words
        low = tl.load(here, mask=low_mask & row_mask[None, :], other=0)
        high = tl.load(here + 1, mask=high_mask & row_mask[None, :], other=0)
        # By one and the rest, since a shift by all 32 bits is not defined.
        packed = ((low >> low_shift) | ((high << 1) << (31 - low_shift))).trans()
        packed = tl.broadcast_to(packed[:, :, None], (BLOCK_ROWS, GROUPS, _GROUP)).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
        code = ((packed >> code_shift) & code_mask).to(tl.int32)
        value = code.to(tl.float32) - middle
        value = value * tl.load(step + row, mask=row_mask, other=0.0)[:, None]
        both = total + value
        if address != 0:
            both = total + value * factor[None, :]
        # A few in a block at most: less work than to look for them among all elements.
        for position in range(first_salient, last_salient):
            channel = tl.load(salient_index + position)
            kept = tl.load(salient + long_row * salient_channels + position, mask=row_mask, other=0.0).to(tl.float32)
            both = tl.where((column == channel)[None, :], total + kept[:, None], both)
        target = out + long_row[:, None] * out_row + out_column[None, :]
        tl.store(target, both.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_bias(out, bias, entry, bits, first_row, first_channel, rows, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr):
    """The bias of a block's rows below ``rows``: the base's, if it has one, plus the expert's difference, if any."""
    row = first_row + tl.arange(0, ROWS)
    mask = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_BIAS:
        total = tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)
    address = tl.load(entry + _BIAS)
    if (bits > 0) & (address != 0):
        total += tl.load(address.to(tl.pointer_type(tl.float32)) + first_channel + row, mask=mask, other=0.0)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=mask)


# No address of known alignment depends on the first channel: one compiled kernel does for all parts of a weight.
@triton.jit(do_not_specialize=["first_channel"])
def _add_delta_kernel(
    out,
    weight,
    bias_out,
    bias,
    table,
    slot,
    first_channel,
    out_features,
    in_features,
    out_row_stride,
    out_column_stride,
    weight_row_stride,
    weight_column_stride,
    HAS_SLOT: tl.constexpr,
    WRITES_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Programs share out blocks of ``[TILES * BLOCK_ROWS, BLOCK_COLUMNS]``; each element is read, then written, once.

    A program has read an element before it writes it and no other touches it, so ``out`` may be ``weight``.
    """
    if HAS_SLOT:
        expert = tl.load(slot).to(tl.int64)
        entry = table + tl.maximum(expert, 0) * _COLUMNS
        bits = tl.where(expert >= 0, tl.load(entry + _BITS), 0).to(tl.int32)
    else:
        entry = table
        bits = tl.load(entry + _BITS).to(tl.int32)
    first_channel = first_channel.to(tl.int64)
    ROWS: tl.constexpr = TILES * BLOCK_ROWS
    # One at least, for the bias of a layer without inputs.
    column_blocks = tl.maximum(tl.cdiv(in_features, BLOCK_COLUMNS), 1)
    for block in range(tl.program_id(0), tl.cdiv(out_features, ROWS) * column_blocks, tl.num_programs(0)):
        first_row = (block // column_blocks) * ROWS
        column = (block % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_mask = column < in_features
        # 64-bit: a weight that is seen transposed has columns as far apart as others have rows.
        out_column = column.to(tl.int64) * out_column_stride
        weight_column = column.to(tl.int64) * weight_column_stride
        if bits > 0:
            _add_block(
                out, weight, entry, bits, out_row_stride, weight_row_stride, out_column, weight_column, first_row,
                first_channel, out_features, in_features, column, column_mask, BLOCK_ROWS, BLOCK_COLUMNS, TILES,
            )  # fmt: skip
        else:
            _copy_block(
                out, weight, out_row_stride, weight_row_stride, out_column, weight_column, first_row, out_features,
                column_mask, BLOCK_ROWS, TILES,
            )  # fmt: skip
        if WRITES_BIAS:
            # One block of a row of blocks does it.
            rows = tl.where(block % column_blocks == 0, out_features, 0)
            _add_bias(bias_out, bias, entry, bits, first_row, first_channel, rows, HAS_BIAS, ROWS)


def add_delta_triton(
    out: torch.Tensor,
    weight: torch.Tensor,
    bias_out: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    slot: torch.Tensor | None,
    first_channel: int = 0,
    programs: int | None = None,
    sizes: AddSizes = _DEFAULT,
) -> None:
    """Write ``out``, and ``bias_out`` where there is one, every element of them.

    Args:
        out: ``[out, in]``, float32, bfloat16 or float16, any strides: the result. It may be ``weight``.
        weight: ``[out, in]`` of that dtype, any strides. Rows are read and written in wide vectors where they are
            contiguous, they and their distance are multiples of 16 elements and the first starts at one of 16 bytes.
        bias_out: contiguous ``[out]`` of that dtype: the base's bias plus the expert's difference.
        bias: contiguous ``[out]`` of that dtype, the base's; zero if `None`.
        table: contiguous int64 ``[slots, len(COLUMNS)]``.
        slot: int32 or int64 of one element, on the device; the table's first if `None`.
        first_channel: output channel of the table's delta that belongs to the first of ``weight``.
        programs: at most so many programs; as many as there are blocks if `None`.
        sizes: sizes of blocks.
    """
    out_features, in_features = weight.shape
    column_blocks = max(1, triton.cdiv(in_features, sizes.block_columns))
    blocks = column_blocks * triton.cdiv(out_features, sizes.block_rows * sizes.tiles)
    if blocks == 0:
        return
    # Triton launches on the current device, which need not be the tensors'.
    with torch.accelerator.device_index(weight.device.index):
        # Pointers that the specialised kernel never reads still need a tensor.
        _add_delta_kernel[(min(blocks, programs or blocks),)](
            out,
            weight,
            out if bias_out is None else bias_out,
            weight if bias is None else bias,
            table,
            table if slot is None else slot,
            first_channel,
            out_features,
            in_features,
            *out.stride(),
            *weight.stride(),
            HAS_SLOT=slot is not None,
            WRITES_BIAS=bias_out is not None,
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=sizes.block_rows,
            BLOCK_COLUMNS=sizes.block_columns,
            TILES=sizes.tiles,
            num_warps=sizes.warps,
            # A product that is not rounded before it is added would differ from torch's in the last place.
            enable_fp_fusion=False,
        )
