"""Which rows of a batch share an expert, worked out on the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from .op import add_op_namespace_prefix, has_kernel

_group_with_triton: Callable[..., None] | None = None
_BLOCKS: tuple[int, ...] = ()
if importlib.util.find_spec("triton") is not None:
    from .triton_group_rows import BLOCKS, group_rows_triton

    _group_with_triton, _BLOCKS = group_rows_triton, BLOCKS

__all__ = ["RowGroups", "group_rows", "load_group_rows"]

#: Devices, dtypes and sizes that the kernel has been launched for.
_LOADED: set[tuple[torch.device, torch.dtype, int]] = set()


class RowGroups(NamedTuple):
    """The rows of a batch in an order in which those of one expert are neighbours. The same for all layers of a step.

    Groups of one row come first: their kernel is another than that of groups of several. Among either, slots ascend.

    Attributes:
        order: int32 ``[rows]``, the row at each position.
        slot: int32 ``[rows]``, the slot of the row at each position; -1 for the base alone.
        start: int32 ``[rows + 1]``: group ``g`` has the positions from ``start[g]`` to ``start[g + 1]``.
        group_count: int32 ``[2]``, the number of groups of one row, and that of all groups; rows of the base alone
            are a group.
    """

    order: torch.Tensor
    slot: torch.Tensor
    start: torch.Tensor
    group_count: torch.Tensor


def group_rows(expert_index: torch.Tensor) -> RowGroups:
    """Group rows by expert, without waiting for the device: CUDA graphs capture it and ``torch.compile`` traces it.

    A few rows take one kernel, but no graph whose capture would be the first to launch it for so many, as CUDA loads
    none then.

    Args:
        expert_index: int32 or int64 ``[rows]``, the slot of each row's expert; negative for the base alone.

    Returns:
        The groups, on the same device.

    >>> groups = group_rows(torch.tensor([3, -1, 3, 0, -1, 1]))
    >>> groups.order.tolist(), groups.slot.tolist(), groups.start.tolist(), groups.group_count.tolist()
    ([3, 5, 1, 4, 0, 2], [0, 1, -1, -1, 3, 3], [0, 1, 2, 4, 6, 6, 6], [2, 4])
    """
    if torch.compiler.is_compiling():
        return RowGroups(*_group_rows(expert_index))
    kernel = _kernel_for(expert_index)
    if kernel is None:
        return _group_by_sorting(expert_index)
    groups = _group_by_comparing(expert_index)
    _LOADED.add(kernel)
    return groups


@torch.library.custom_op(add_op_namespace_prefix("group_rows"), mutates_args=())
def _group_rows(expert_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(group_rows(expert_index))  # type: ignore[return-value]


@_group_rows.register_fake
def _(expert_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(_new_groups(expert_index))  # type: ignore[return-value]


def load_group_rows(device: torch.device) -> None:
    """Launch the kernel for each number of rows that it is compiled for, so that graphs captured later have it.

    Nothing happens on a device without kernels.
    """
    if has_kernel(device):
        for rows in _BLOCKS:
            group_rows(torch.zeros(rows, dtype=torch.int32, device=device))


def _kernel_for(expert_index: torch.Tensor) -> tuple[torch.device, torch.dtype, int] | None:
    """The kernel for so many rows, if there is one that is loaded or may be now."""
    rows, device, dtype = expert_index.shape[0], expert_index.device, expert_index.dtype
    block = next((block for block in _BLOCKS if 0 < rows <= block), None)
    if block is None or not has_kernel(device) or dtype not in (torch.int32, torch.int64):
        return None
    kernel = (device, dtype, block)
    if kernel not in _LOADED and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    return kernel


def _group_by_comparing(expert_index: torch.Tensor) -> RowGroups:
    assert _group_with_triton is not None
    groups = _new_groups(expert_index)
    _group_with_triton(expert_index.contiguous(), *groups)
    return groups


def _new_groups(expert_index: torch.Tensor) -> RowGroups:
    rows = expert_index.shape[0]
    return RowGroups(*(expert_index.new_empty(size, dtype=torch.int32) for size in (rows, rows, rows + 1, 2)))


def _group_by_sorting(expert_index: torch.Tensor) -> RowGroups:
    rows = expert_index.shape[0]
    slot, order = torch.sort(expert_index.clamp(min=-1), stable=True)
    alone = _differs_from_last(slot)
    alone[:-1] &= alone[1:].clone()
    moved = torch.argsort((~alone).to(torch.uint8), stable=True)
    slot, order = slot[moved], order[moved]
    is_first = _differs_from_last(slot)
    group = torch.cumsum(is_first, 0)
    position = torch.arange(rows, dtype=torch.int32, device=slot.device)
    # Position by group; rows that are not the first of theirs go to a place that is cut off.
    start = torch.full((rows + 2,), rows, dtype=torch.int32, device=slot.device)
    start.scatter_(0, torch.where(is_first, group - 1, rows + 1), position)
    group_count = torch.stack([alone.sum(dtype=torch.int32), is_first.sum(dtype=torch.int32)])
    return RowGroups(order.to(torch.int32), slot.to(torch.int32), start[: rows + 1], group_count)


def _differs_from_last(slot: torch.Tensor) -> torch.Tensor:
    """Whether each is another than the one before it, as the first is: bool ``[rows]``."""
    differs = torch.ones_like(slot, dtype=torch.bool)
    differs[1:] = slot[1:] != slot[:-1]
    return differs
