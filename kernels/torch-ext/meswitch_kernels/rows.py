"""Embeddings and output heads of a batch whose rows have different experts, as torch operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .configurations import Key, configuration
from .expert_table import COLUMNS
from .numerics import numerics_of, prepared
from .op import add_op_namespace_prefix, has_kernel
from .row_groups import RowGroups
from .rows_reference import embed_rows_reference, head_rows_reference
from .rows_table import ROWS_COLUMNS
from .table_views import check_addressable, rows_of_slot

_embed_with_triton: Callable[..., None] | None = None
_head_with_triton: Callable[..., None] | None = None
if importlib.util.find_spec("triton") is not None:
    from .triton_embed_rows import embed_rows_triton
    from .triton_head_rows import head_rows_triton

    _embed_with_triton = embed_rows_triton
    _head_with_triton = head_rows_triton

__all__ = ["embed_rows", "head_rows"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def embed_rows(
    ids: torch.Tensor,
    base_out: torch.Tensor,
    weight: torch.Tensor,
    coded_table: torch.Tensor,
    rows_table: torch.Tensor,
    expert_index: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The base's embeddings with experts' rows in place of those that their experts changed or added.

    A coded row is the base's plus its delta, added in float32 and rounded once. Nothing waits for the device and no
    shape depends on its data, so CUDA graphs capture it. There are no gradients.

    Args:
        ids: int32 or int64 ``[batch, ...]``.
        base_out: ``[batch, ..., width]``, float32, bfloat16 or float16: what the base's module gives, scaled; anything
            where an id is new.
        weight: ``[base rows, width]``, the base's matrix, not scaled; rows have to be contiguous.
        coded_table: int64 ``[slots, len(COLUMNS)]``, the ``coded`` of a :class:`~meswitch_kernels.RowsTable`.
        rows_table: int64 ``[slots, len(ROWS_COLUMNS)]``, its ``rows``. A slot that is empty changes nothing; one that
            the table lacks is not checked for.
        expert_index: int32 ``[batch]``, the slot of each row's expert; negative for the base.
        scale: one element, the factor that the base's module applies to its rows, if it does.

    Returns:
        As ``base_out``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: the device is neither the CPU nor one that Triton serves.

    >>> from meswitch_kernels import RowsLeaves, RowsTable, map_rows
    >>> table = RowsTable(1, width=2)
    >>> row_map = map_rows(2, None, torch.tensor([1]), torch.device("cpu"))
    >>> table.set(0, RowsLeaves(row_map, own=torch.tensor([[5.0, 6.0]])))
    >>> weight, ids = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1], [1]])
    >>> index = torch.tensor([-1, 0], dtype=torch.int32)
    >>> embed_rows(ids, weight[ids], weight, table.coded, table.rows, index).tolist()
    [[[3.0, 4.0]], [[5.0, 6.0]]]
    """
    _check_tables(coded_table, rows_table, base_out)
    if tuple(base_out.shape) != (*ids.shape, weight.shape[1]) or base_out.dtype not in _DTYPES:
        raise ValueError(
            f"base_out is {base_out.dtype} of shape {tuple(base_out.shape)}, expected {(*ids.shape, weight.shape[1])} "
            f"of {', '.join(map(str, _DTYPES))}."
        )
    if weight.stride(1) != 1:
        raise ValueError(f"weight has strides {weight.stride()}; its rows have to be contiguous.")
    if tuple(expert_index.shape) != (ids.shape[0],) or expert_index.dtype != torch.int32:
        raise ValueError(
            f"expert_index is {expert_index.dtype} of shape {tuple(expert_index.shape)}, expected torch.int32 "
            f"{(ids.shape[0],)}."
        )
    if not ids.device == weight.device == expert_index.device == base_out.device:
        raise ValueError(
            f"base_out is on {base_out.device}, ids on {ids.device}, the weight on {weight.device} and expert_index "
            f"on {expert_index.device}."
        )
    return _embed_rows(ids, base_out, weight, scale, coded_table, rows_table, expert_index)


def head_rows(
    x: torch.Tensor,
    base_out: torch.Tensor,
    coded_table: torch.Tensor,
    rows_table: torch.Tensor,
    groups: RowGroups,
    *,
    capacity: int,
) -> torch.Tensor:
    """The base's logits, corrected or replaced for the rows of the head that each row's expert changed or added.

    Made for the few rows of a decoding step, and right for any number; the rest as of :func:`embed_rows`. Products
    are summed in float32.

    Args:
        x: ``[rows, width]``, float32, bfloat16 or float16.
        base_out: ``[rows, base rows]`` of one of these dtypes: the base's logits.
        coded_table: int64 ``[slots, len(COLUMNS)]``, the ``coded`` of a :class:`~meswitch_kernels.RowsTable`.
        rows_table: int64 ``[slots, len(ROWS_COLUMNS)]``, its ``rows``.
        groups: the rows by expert, of :func:`~meswitch_kernels.group_rows`.
        capacity: ids of the result.

    Returns:
        ``[rows, capacity]`` of the dtype of ``base_out``; ``-inf`` at ids that a row's expert does not know: those
        beyond its map, and for the base and an empty slot those beyond ``base_out``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: the device is neither the CPU nor one that Triton serves.

    >>> from meswitch_kernels import RowsLeaves, RowsTable, group_rows, map_rows
    >>> table = RowsTable(1, width=2)
    >>> row_map = map_rows(2, None, torch.tensor([1]), torch.device("cpu"))
    >>> table.set(0, RowsLeaves(row_map, own=torch.tensor([[5.0, 6.0]])))
    >>> x, base_out, groups = torch.ones(2, 2), torch.tensor([[3.0], [3.0]]), group_rows(torch.tensor([-1, 0]))
    >>> head_rows(x, base_out, table.coded, table.rows, groups, capacity=2).tolist()
    [[3.0, -inf], [3.0, 11.0]]
    """
    _check_tables(coded_table, rows_table, x)
    for name, tensor in (("x", x), ("base_out", base_out)):
        if tensor.ndim != 2 or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected a matrix of "
                f"{', '.join(map(str, _DTYPES))}."
            )
    if not x.shape[0] == base_out.shape[0] == groups.order.shape[0]:
        raise ValueError(
            f"x has {x.shape[0]} rows and base_out {base_out.shape[0]}, but groups are of {groups.order.shape[0]}."
        )
    if not base_out.device == groups.order.device == x.device:
        raise ValueError(f"x is on {x.device}, base_out on {base_out.device} and groups on {groups.order.device}.")
    return _head_rows(x, base_out, coded_table, rows_table, *groups, capacity)


@torch.library.custom_op(add_op_namespace_prefix("embed_rows"), mutates_args=())
def _embed_rows(
    ids: torch.Tensor,
    base_out: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    coded_table: torch.Tensor,
    rows_table: torch.Tensor,
    expert_index: torch.Tensor,
) -> torch.Tensor:
    width = base_out.shape[-1]
    flat, base = ids.reshape(-1), base_out.reshape(-1, width)
    if _embed_with_triton is None or not has_kernel(ids.device):
        experts = _experts_on_the_host(coded_table, rows_table, width)
        index = expert_index.repeat_interleave(ids.numel() // max(1, ids.shape[0]))
        return embed_rows_reference(flat, base, weight, experts, index, scale).view(base_out.shape)
    y = base_out.new_empty(base_out.shape)
    if y.numel():
        # Triton launches on the current device, which need not be the tensors'.
        with torch.accelerator.device_index(ids.device.index):
            _embed_with_triton(
                y.view(-1, width),
                flat.contiguous(),
                base.contiguous(),
                weight,
                scale,
                coded_table,
                rows_table,
                expert_index.contiguous(),
            )
    return y


@_embed_rows.register_fake
def _(
    ids: torch.Tensor,
    base_out: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    coded_table: torch.Tensor,
    rows_table: torch.Tensor,
    expert_index: torch.Tensor,
) -> torch.Tensor:
    return base_out.new_empty(base_out.shape)


@torch.library.custom_op(add_op_namespace_prefix("head_rows"), mutates_args=())
def _head_rows(
    x: torch.Tensor,
    base_out: torch.Tensor,
    coded_table: torch.Tensor,
    rows_table: torch.Tensor,
    order: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    group_count: torch.Tensor,
    capacity: int,
) -> torch.Tensor:
    groups = RowGroups(order, slot, start, group_count)
    if _head_with_triton is None or not has_kernel(x.device):
        experts = _experts_on_the_host(coded_table, rows_table, x.shape[1])
        expert_index = torch.empty_like(slot)
        expert_index[order.long()] = slot
        return head_rows_reference(x, base_out, experts, expert_index, capacity=capacity)
    y = base_out.new_empty(x.shape[0], capacity)
    if y.numel():
        numerics = numerics_of(x.dtype)
        single = configuration(Key("head_single", numerics, capacity, x.shape[1]), x.device)
        several = configuration(Key("head_several", numerics, capacity, x.shape[1]), x.device)
        x, base_out = x.contiguous(), base_out.contiguous()
        with prepared(x, [coded_table], groups, numerics, single) as arguments:
            _head_with_triton(y, base_out, x, coded_table, rows_table, groups, *arguments, single, several)
    return y


@_head_rows.register_fake
def _(
    x: torch.Tensor,
    base_out: torch.Tensor,
    coded_table: torch.Tensor,
    rows_table: torch.Tensor,
    order: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    group_count: torch.Tensor,
    capacity: int,
) -> torch.Tensor:
    return base_out.new_empty(x.shape[0], capacity)


def _experts_on_the_host(coded_table: torch.Tensor, rows_table: torch.Tensor, width: int) -> list[Any]:
    check_addressable(rows_table.device)
    return [rows_of_slot(coded_table, rows_table, slot, width) for slot in range(rows_table.shape[0])]


def _check_tables(coded_table: torch.Tensor, rows_table: torch.Tensor, like: torch.Tensor) -> None:
    for name, table, columns in (("coded_table", coded_table, COLUMNS), ("rows_table", rows_table, ROWS_COLUMNS)):
        if table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] != len(columns):
            raise ValueError(
                f"{name} is {table.dtype} of shape {tuple(table.shape)}, expected int64 [slots, {len(columns)}]."
            )
        if table.device != like.device or not table.is_contiguous():
            raise ValueError(
                f"{name} is on {table.device} with strides {table.stride()}, expected it contiguous on {like.device}."
            )
