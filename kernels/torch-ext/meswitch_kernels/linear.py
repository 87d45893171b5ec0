"""Linear layers of a batch whose rows have different experts, as torch operators: Triton's, or the reference's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from .configurations import Key, configuration
from .expert_table import COLUMNS
from .numerics import Numerics, numerics_of, prepared
from .op import add_op_namespace_prefix, has_kernel
from .reference import delta_linear_reference
from .row_groups import RowGroups
from .table_views import check_addressable, leaves_of_slot

_add_with_triton: Callable[..., None] | None = None
_multiply_with_triton: Callable[..., None] | None = None
if importlib.util.find_spec("triton") is not None:
    from .triton_delta_linear import delta_linear_triton
    from .triton_fused_linear import fused_linear_triton

    _add_with_triton = delta_linear_triton
    _multiply_with_triton = fused_linear_triton

__all__ = ["delta_linear", "fused_linear", "fused_linears"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def delta_linear(
    x: torch.Tensor,
    base_out: torch.Tensor | None,
    table: torch.Tensor,
    groups: RowGroups,
    *,
    out_features: int,
    numerics: Numerics | None = None,
) -> torch.Tensor:
    """``base_out + x Δ̂ᵀ`` and the bias difference, each row with its own expert's delta.

    Made for the few rows of a decoding step, and right for any number. Nothing waits for the device and no shape
    depends on its data, so CUDA graphs capture it. There are no gradients.

    Args:
        x: ``[rows, in]``, float32, bfloat16 or float16.
        base_out: ``[rows, out]`` of the dtype of ``x``, the base's output; zero if `None`.
        table: int64 ``[slots, len(COLUMNS)]``, the ``rows`` of an :class:`~meswitch_kernels.ExpertTable` of the layer.
        groups: the rows by expert, of :func:`~meswitch_kernels.group_rows`. A slot that is empty adds nothing; one
            that the table lacks is not checked for.
        out_features: output channels.
        numerics: how the delta is multiplied by; 16-bit integers if `None` and ``x`` is of 16 bit, else exactly.

    Returns:
        ``[rows, out]`` of the dtype of ``x``, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or unknown numerics.
        NotImplementedError: the device is neither the CPU nor one that Triton serves.

    >>> from meswitch_kernels import DeltaLeaves, ExpertTable, align_rows, group_rows
    >>> table = ExpertTable(1, out_features=1, in_features=2)
    >>> codes = align_rows(torch.tensor([[0b1100]], dtype=torch.uint8))  # the codes 0 and 3
    >>> table.set(0, DeltaLeaves(codes, torch.tensor([2.0]), bits=2))
    >>> x, base_out = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[10.0], [20.0]])
    >>> delta_linear(x, base_out, table.rows, group_rows(torch.tensor([-1, 0])), out_features=1)
    tensor([[10.],
            [23.]])
    """
    _check(x, table, groups)
    if base_out is not None:
        _check_tensor("base_out", base_out, (x.shape[0], out_features), x)
    return _delta_linear(x, base_out, table, *groups, out_features, numerics_of(x.dtype, numerics))


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    groups: RowGroups,
    *,
    numerics: Numerics | None = None,
) -> torch.Tensor:
    """``x (W + Δ̂)ᵀ`` and both biases, each row with its own expert's delta.

    One row's base and delta are one kernel. Of more rows torch multiplies by the base, and the deltas are added to
    that in place.

    Args:
        x: ``[rows, in]``, float32, bfloat16 or float16.
        weight: ``[out, in]`` of the dtype of ``x``: the base's. Any strides; rows should be contiguous.
        bias: ``[out]``, the base's.
        table: int64 ``[slots, len(COLUMNS)]``; this and the rest as of :func:`delta_linear`.
        groups: the rows by expert.
        numerics: how the delta is multiplied by; 16-bit integers if `None` and ``x`` is of 16 bit, else exactly.

    Returns:
        ``[rows, out]`` of the dtype of ``x``, rounded once where Triton runs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or unknown numerics.
        NotImplementedError: the device is neither the CPU nor one that Triton serves.

    >>> from meswitch_kernels import ExpertTable, group_rows
    >>> table = ExpertTable(1, out_features=1, in_features=2)
    >>> fused_linear(torch.ones(1, 2), torch.ones(1, 2), None, table.rows, group_rows(torch.tensor([0])))
    tensor([[2.]])
    """
    return fused_linears(x, [weight], [bias], [table], groups, numerics=numerics)[0]


def fused_linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    tables: Sequence[torch.Tensor],
    groups: RowGroups,
    *,
    numerics: Numerics | None = None,
) -> list[torch.Tensor]:
    """:func:`fused_linear` of several linears of the same input, such as an attention's queries, keys and values.

    Their deltas share launches, since small ones take about as long to start as to run. Of one row their bases share
    these, too, if the weights have the same strides and all or none of the linears has a bias.

    Args:
        x: ``[rows, in]``, float32, bfloat16 or float16.
        weights: ``[out, in]`` each, of the dtype of ``x``; one or more.
        biases: ``[out]`` each, or `None`.
        tables: int64 ``[slots, len(COLUMNS)]`` each.
        groups: the rows by expert.
        numerics: how deltas are multiplied by, as of :func:`fused_linear`.

    Returns:
        By linear ``[rows, out]`` of the dtype of ``x``.

    Raises:
        ValueError: no linears, not as many of each, or as of :func:`fused_linear`.
        NotImplementedError: the device is neither the CPU nor one that Triton serves.

    >>> from meswitch_kernels import ExpertTable, group_rows
    >>> tables = [ExpertTable(1, out_features=out, in_features=2).rows for out in (1, 2)]
    >>> weights = [torch.ones(1, 2), torch.eye(2)]
    >>> fused_linears(torch.ones(1, 2), weights, [None, None], tables, group_rows(torch.tensor([0])))
    [tensor([[2.]]), tensor([[1., 1.]])]
    """
    if not len(weights) == len(biases) == len(tables) > 0:
        raise ValueError(
            f"got {len(weights)} weights, {len(biases)} biases and {len(tables)} tables, expected as many of each, at "
            "least one."
        )
    for weight, bias, table in zip(weights, biases, tables, strict=True):
        _check_weight(x, weight, bias, table, groups)
    return _fused_linears(x, list(weights), list(biases), list(tables), *groups, numerics_of(x.dtype, numerics))


@torch.library.custom_op(add_op_namespace_prefix("delta_linear"), mutates_args=())
def _delta_linear(
    x: torch.Tensor,
    base_out: torch.Tensor | None,
    table: torch.Tensor,
    order: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    group_count: torch.Tensor,
    out_features: int,
    numerics: str,
) -> torch.Tensor:
    groups = RowGroups(order, slot, start, group_count)
    if _add_with_triton is None or not has_kernel(x.device):
        return _by_reference(x, base_out, table, groups, out_features)
    y = x.new_empty(x.shape[0], out_features)
    base_outs = None if base_out is None else [base_out.contiguous()]
    _write_deltas([y], base_outs, x.contiguous(), [table], groups, numerics)
    return y


@_delta_linear.register_fake
def _(
    x: torch.Tensor,
    base_out: torch.Tensor | None,
    table: torch.Tensor,
    order: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    group_count: torch.Tensor,
    out_features: int,
    numerics: str,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op(add_op_namespace_prefix("fused_linears"), mutates_args=())
def _fused_linears(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    tables: list[torch.Tensor],
    order: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    group_count: torch.Tensor,
    numerics: str,
) -> list[torch.Tensor]:
    groups = RowGroups(order, slot, start, group_count)
    linears = list(zip(weights, biases, tables, strict=True))
    if _multiply_with_triton is None or not has_kernel(x.device):
        return [_by_reference(x, F.linear(x, w, b), table, groups, w.shape[0]) for w, b, table in linears]
    some = [bias.contiguous() for bias in biases if bias is not None]
    alike = len({weight.stride() for weight in weights}) == 1 and len(some) in (0, len(biases))
    if x.shape[0] != 1 or not alike:
        ys = [F.linear(x, weight, bias) for weight, bias, _ in linears]
        _write_deltas(ys, ys, x.contiguous(), tables, groups, numerics)
        return ys
    ys = [x.new_empty(1, weight.shape[0]) for weight in weights]
    out_features = sum(y.shape[1] for y in ys)
    if out_features == 0:
        return ys
    x = x.contiguous()
    sizes = configuration(Key("fused", numerics, out_features, x.shape[1]), x.device)
    with prepared(x, tables, groups, numerics, sizes) as arguments:
        _multiply_with_triton(ys, x, weights, some or None, tables, groups, *arguments, sizes)
    return ys


@_fused_linears.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    tables: list[torch.Tensor],
    order: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    group_count: torch.Tensor,
    numerics: str,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _write_deltas(
    ys: Sequence[torch.Tensor],
    base_outs: Sequence[torch.Tensor] | None,
    x: torch.Tensor,
    tables: Sequence[torch.Tensor],
    groups: RowGroups,
    numerics: str,
) -> None:
    """Write each ``y`` with the kernels, ``base_outs`` being `None` or contiguous, and ``ys`` themselves perhaps."""
    assert _add_with_triton is not None
    out_features = sum(y.shape[1] for y in ys)
    if x.shape[0] == 0 or out_features == 0:
        return
    single = configuration(Key("single", numerics, out_features, x.shape[1]), x.device)
    several = configuration(Key("several", numerics, out_features, x.shape[1]), x.device)
    with prepared(x, tables, groups, numerics, single) as arguments:
        _add_with_triton(ys, base_outs, x, tables, groups, *arguments, single, several)


def _by_reference(
    x: torch.Tensor, base_out: torch.Tensor | None, table: torch.Tensor, groups: RowGroups, out_features: int
) -> torch.Tensor:
    check_addressable(x.device)
    slots = range(table.shape[0])
    experts = [leaves_of_slot(table, slot, out_features, x.shape[1]) for slot in slots]
    expert_index = torch.empty_like(groups.slot)
    expert_index[groups.order.long()] = groups.slot
    return delta_linear_reference(x, base_out, experts, expert_index, out_features=out_features)


def _check_weight(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor, groups: RowGroups
) -> None:
    _check(x, table, groups)
    _check_tensor("weight", weight, (weight.shape[0], x.shape[1]), x)
    if bias is not None:
        _check_tensor("bias", bias, (weight.shape[0],), x)


def _check(x: torch.Tensor, table: torch.Tensor, groups: RowGroups) -> None:
    if x.ndim != 2 or x.dtype not in _DTYPES:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, expected [rows, in] of {', '.join(map(str, _DTYPES))}."
        )
    if table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] != len(COLUMNS) or not table.is_contiguous():
        raise ValueError(
            f"table is {table.dtype} of shape {tuple(table.shape)}, expected contiguous int64 [slots, {len(COLUMNS)}]."
        )
    if groups.order.shape[0] != x.shape[0]:
        raise ValueError(f"groups are of {groups.order.shape[0]} rows, but x has {x.shape[0]}.")
    if not table.device == groups.order.device == x.device:
        raise ValueError(f"x is on {x.device}, the table on {table.device} and groups on {groups.order.device}.")


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, expected {shape}.")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}.")
