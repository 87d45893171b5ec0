"""The tensors of one expert's rows of an embedding or output head, and the map from ids to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .delta_leaves import DeltaLeaves, check_leaves

__all__ = ["BASE_ROW", "OWN_DTYPES", "RowsLeaves", "check_rows_leaves", "map_rows"]

#: What a map says of an id whose row is the base's. Own rows are numbered downwards from the next lower number.
BASE_ROW = -1
#: Dtypes that own rows may have; a table says which by the place here, counted from 1.
OWN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RowsLeaves:
    """What an expert has in place of the base's rows, for each of the ``known`` ids of its vocabulary.

    Attributes:
        row_map: int32 ``[known]``, of :func:`map_rows`.
        coded: quantised deltas against the base's rows: those of a linear with an output channel for each coded row.
            It has no column steps and no bias.
        own: ``[own rows, width]`` of one of :data:`OWN_DTYPES`: rows that take nothing from the base's.
        bias: float32 ``[known]``, what the logits lack in bias; of an output head.
    """

    row_map: torch.Tensor
    coded: DeltaLeaves | None = None
    own: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def map_rows(known: int, coded: torch.Tensor | None, own: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Where the row of each id is. Takes 4 bytes an id.

    Args:
        known: ids of the vocabulary.
        coded: int32 or int64 ``[coded rows]``, the id of each coded row, if there are any.
        own: the same of own rows. No id is in both; ids from ``known`` on are left out.
        device: where they are.

    Returns:
        int32 ``[known]``: the place of the id's coded row among them, or -2 minus that of its own row, or -1 for the
        base's row.

    >>> map_rows(5, torch.tensor([0, 3]), torch.tensor([2, 4]), torch.device("cpu")).tolist()
    [0, -1, -2, 1, -3]
    """
    row_map = torch.full((known,), BASE_ROW, dtype=torch.int32, device=device)
    for index, first, sign in ((coded, 0, 1), (own, BASE_ROW - 1, -1)):
        if index is not None:
            place = first + sign * torch.arange(len(index), dtype=torch.int32, device=device)
            inside = index < known
            row_map[index[inside].long()] = place[inside]
    return row_map


def check_rows_leaves(leaves: RowsLeaves, width: int, device: torch.device) -> None:
    """Refuse what the kernels would read wrongly: they see addresses, not tensors.

    Args:
        leaves: the rows.
        width: columns of the embedding or head.
        device: where it is.

    Raises:
        ValueError: a tensor of another dtype, shape, device or layout, or a delta with column steps or a bias. The
            values of the map are not checked.
    """
    if leaves.coded is not None:
        check_leaves(leaves.coded, leaves.coded.codes.shape[0], width, device)
        if leaves.coded.column_step is not None or leaves.coded.bias is not None:
            raise ValueError("coded rows have neither column steps nor a bias.")
    known = (leaves.row_map.shape[0],)
    _check("row_map", leaves.row_map, (torch.int32,), known, device)
    if leaves.own is not None:
        _check("own", leaves.own, OWN_DTYPES, (leaves.own.shape[0], width), device)
    if leaves.bias is not None:
        _check("bias", leaves.bias, (torch.float32,), known, device)


def _check(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is of dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, expected {shape}.")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but the layer is on {device}.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it has to be contiguous.")
