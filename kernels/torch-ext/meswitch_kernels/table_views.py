"""The tensors that a table's addresses stand for, where the table is in the processor's own memory."""

from __future__ import annotations

import ctypes
import math

import torch

from .delta_leaves import DeltaLeaves
from .expert_table import COLUMNS
from .rows_leaves import BASE_ROW, OWN_DTYPES, RowsLeaves
from .rows_table import ROWS_COLUMNS

__all__ = ["check_addressable", "leaves_of_slot", "rows_of_slot"]


def check_addressable(device: torch.device) -> None:
    """Refuse a device whose addresses mean nothing here.

    Raises:
        NotImplementedError: it is not the CPU; kernels would have had to read its tables.
    """
    if device.type != "cpu":
        raise NotImplementedError(
            f"There are no kernels for {device}, and the addresses in a table mean nothing here."
        )


def leaves_of_slot(rows: torch.Tensor, slot: int, out_features: int, in_features: int) -> DeltaLeaves | None:
    """Views of the tensors in a slot. They are valid as long as the slot is set as it is.

    Args:
        rows: int64 ``[slots, len(COLUMNS)]`` on the CPU, of an :class:`~meswitch_kernels.ExpertTable`.
        slot: which row.
        out_features: output channels of the layer.
        in_features: input channels of the layer.

    Returns:
        The delta, or `None` where the slot is empty.
    """
    row = dict(zip(COLUMNS, rows[slot].tolist(), strict=True))
    bits, salient = row["bits"], row["salient_channels"]
    if bits == 0:
        return None
    coded = in_features - salient
    width = (coded * bits + 7) // 8
    stride = row["row_bytes"] or width
    memory = _view(row["codes"], torch.uint8, ((out_features - 1) * stride + width,) if width else (0,))
    has_salient = row["salient_index"] != 0
    return DeltaLeaves(
        codes=memory.as_strided((out_features, width), (stride, 1)),
        step=_view(row["step"], torch.float32, (out_features,)),
        bits=bits,
        column_step=_view(row["column_step"], torch.float32, (coded,)) if row["column_step"] else None,
        salient_index=_view(row["salient_index"], torch.int32, (salient,)) if has_salient else None,
        salient=_view(row["salient"], torch.bfloat16, (out_features, salient)) if has_salient else None,
        bias=_view(row["bias"], torch.float32, (out_features,)) if row["bias"] else None,
    )


def rows_of_slot(coded: torch.Tensor, rows: torch.Tensor, slot: int, width: int) -> RowsLeaves | None:
    """Views of the tensors in a slot of a :class:`~meswitch_kernels.RowsTable`; valid as long as it is set as it is.

    Args:
        coded: int64 ``[slots, len(COLUMNS)]`` on the CPU.
        rows: int64 ``[slots, len(ROWS_COLUMNS)]`` on the CPU.
        slot: which row.
        width: columns of the embedding or head.

    Returns:
        The rows, as many of each sort as the map refers to; `None` where the slot is empty.
    """
    row = dict(zip(ROWS_COLUMNS, rows[slot].tolist(), strict=True))
    known = row["known"]
    if known == 0:
        return None
    row_map = _view(row["row_map"], torch.int32, (known,))
    coded_rows = max(0, int(row_map.max()) + 1)
    own_rows = max(0, BASE_ROW - int(row_map.min()))
    return RowsLeaves(
        row_map=row_map,
        coded=leaves_of_slot(coded, slot, coded_rows, width) if coded_rows else None,
        own=_view(row["own"], OWN_DTYPES[row["own_dtype"] - 1], (own_rows, width)) if own_rows else None,
        bias=_view(row["bias"], torch.float32, (known,)) if row["bias"] else None,
    )


def _view(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
