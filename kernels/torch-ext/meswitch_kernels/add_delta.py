"""A weight plus an expert's delta, written out dense: for merging, and for matmuls of many rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch

from .delta_leaves import DeltaLeaves, align_rows
from .expert_table import COLUMNS, ExpertTable
from .op import add_op_namespace_prefix, has_kernel
from .reference import add_delta_reference
from .table_views import check_addressable, leaves_of_slot

_add_with_triton: Callable[..., None] | None = None
if importlib.util.find_spec("triton") is not None:
    from .triton_add_delta import add_delta_triton

    _add_with_triton = add_delta_triton

__all__ = ["add_delta", "check_add_delta", "merged_weight", "write_sum"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_delta(
    weight: torch.Tensor,
    table: torch.Tensor,
    slot: int | torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bias_out: torch.Tensor | None = None,
    first_channel: int = 0,
    programs: int | None = None,
) -> torch.Tensor:
    """``W + Δ̂``, added in float32 and rounded once, so Triton and torch give the same bits.

    Nothing waits for the device, so CUDA graphs capture it, and one that was captured sees the expert that is in the
    slot when it is replayed. There are no gradients. At the memory's speed where rows are contiguous and ``in`` and
    the distance of rows are multiples of 16; right for any shape and strides.

    Args:
        weight: ``[out, in]``, float32, bfloat16 or float16: the base's. Any strides.
        table: int64 ``[slots, len(COLUMNS)]``, the ``rows`` of an :class:`~meswitch_kernels.ExpertTable` of the layer.
        slot: which of them; or a tensor on the device, int32 or int64 ``[1]``, negative for the base alone, that is
            read when the kernel runs; one that the table lacks is not checked for. An empty slot adds nothing.
        out: ``[out, in]`` of the dtype of ``weight``, any strides: the result. ``weight`` itself, or memory apart from
            it. New if `None`.
        bias: ``[out]`` of that dtype, the base's; zero if `None`. It is read only for ``bias_out``.
        bias_out: contiguous ``[out]`` of that dtype, ``bias`` or memory apart from it: gets ``bias`` plus the
            expert's difference, rounded once.
        first_channel: ``weight``, ``out`` and both biases are the channels of the layer from this one on, so many as
            they have; that the layer has so many is not checked.
        programs: the kernel starts at most so many, which leaves multiprocessors to what runs beside it.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit together, or a negative first channel.
        IndexError: no such slot.
        NotImplementedError: the device is neither the CPU nor one that Triton serves.

    >>> from meswitch_kernels import align_rows
    >>> table = ExpertTable(1, out_features=1, in_features=2)
    >>> codes = align_rows(torch.tensor([[0b1100]], dtype=torch.uint8))  # the codes 0 and 3
    >>> table.set(0, DeltaLeaves(codes, torch.tensor([2.0]), bits=2))
    >>> add_delta(torch.tensor([[10.0, 20.0]]), table.rows, 0)
    tensor([[ 7., 23.]])
    """
    check_add_delta(weight, table, slot, out, bias, bias_out)
    if first_channel < 0:
        raise ValueError(f"first_channel is {first_channel}, expected 0 or more.")
    table, slot_tensor = _split(table, slot)
    if out is None:
        out = torch.empty_like(weight)
    # An operator may not be told of one tensor under two names of which it changes one.
    _add_delta(
        None if out is weight else weight,
        table,
        slot_tensor,
        out,
        None if bias_out is None or bias_out is bias else bias,
        bias_out,
        bias is not None and bias_out is bias,
        first_channel,
        programs,
    )
    return out


def merged_weight(weight: torch.Tensor, leaves: DeltaLeaves, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``W + Δ̂`` of an expert that is in no table, as :func:`add_delta` makes it.

    Args:
        weight: ``[out, in]``, float32, bfloat16 or float16: the base's. Any strides.
        leaves: the expert's delta, on the same device; codes whose rows are not aligned are copied for the while. Its
            bias plays no part.
        out: ``[out, in]`` of the dtype of ``weight``: ``weight`` itself, or memory apart from it. New if `None`.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit together.
        NotImplementedError: the device is neither the CPU nor one that Triton serves.

    >>> codes = torch.tensor([[0b1100]], dtype=torch.uint8)  # the codes 0 and 3
    >>> merged_weight(torch.tensor([[10.0, 20.0]]), DeltaLeaves(codes, torch.tensor([2.0]), bits=2))
    tensor([[ 7., 23.]])
    """
    if weight.ndim != 2:
        raise ValueError(f"weight is of shape {tuple(weight.shape)}, expected [out, in].")
    out_features, in_features = weight.shape
    table = ExpertTable(1, out_features, in_features, weight.device)
    table.set(0, replace(leaves, codes=align_rows(leaves.codes)))
    return add_delta(weight, table.rows, 0, out=out)


@torch.library.custom_op(add_op_namespace_prefix("add_delta"), mutates_args=("out", "bias_out"))
def _add_delta(
    weight: torch.Tensor | None,
    table: torch.Tensor,
    slot: torch.Tensor | None,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    bias_out: torch.Tensor | None,
    bias_in_place: bool,
    first_channel: int,
    programs: int | None,
) -> None:
    """``weight`` is `None` where it is ``out``; ``bias_in_place`` where the bias is ``bias_out``."""
    weight = out if weight is None else weight
    bias = bias_out if bias_in_place else bias
    write_sum(weight, table, 0 if slot is None else slot, out, bias, bias_out, first_channel, programs)


def write_sum(
    weight: torch.Tensor,
    table: torch.Tensor,
    slot: int | torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    bias_out: torch.Tensor | None,
    first_channel: int,
    programs: int | None,
) -> None:
    """:func:`add_delta` of arguments that were checked, not as an operator, on which the host spends most of a call.

    ``torch.compile`` does not trace through it, and autograd hears nothing of what it writes.
    """
    table, slot_tensor = _split(table, slot)
    if _add_with_triton is not None and has_kernel(weight.device):
        bias = None if bias is None else bias.contiguous()
        _add_with_triton(out, weight, bias_out, bias, table, slot_tensor, first_channel, programs)
        return
    check_addressable(weight.device)
    number = 0 if slot_tensor is None else int(slot_tensor)
    end, in_features = first_channel + weight.shape[0], weight.shape[1]
    leaves = None if number < 0 else leaves_of_slot(table, number, end, in_features)
    if leaves is not None and first_channel > 0:
        leaves = _from_channel(leaves, first_channel)
    add_delta_reference(weight, leaves, out, bias, bias_out)


def _split(table: torch.Tensor, slot: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A table and which of its rows; the first where that is `None`."""
    # A view, so that the number is in no graph's constants.
    return (table[slot : slot + 1], None) if isinstance(slot, int) else (table, slot)


@_add_delta.register_fake
def _(
    weight: torch.Tensor | None,
    table: torch.Tensor,
    slot: torch.Tensor | None,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    bias_out: torch.Tensor | None,
    bias_in_place: bool,
    first_channel: int,
    programs: int | None,
) -> None:
    return None


def _from_channel(leaves: DeltaLeaves, first: int) -> DeltaLeaves:
    """Views of the output channels from one on."""
    return replace(
        leaves,
        codes=leaves.codes[first:],
        step=leaves.step[first:],
        salient=None if leaves.salient is None else leaves.salient[first:],
        bias=None if leaves.bias is None else leaves.bias[first:],
    )


def check_add_delta(
    weight: torch.Tensor,
    table: torch.Tensor,
    slot: int | torch.Tensor,
    out: torch.Tensor | None,
    bias: torch.Tensor | None,
    bias_out: torch.Tensor | None,
) -> None:
    """Refuse arguments of :func:`add_delta` that do not fit together.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not.
        IndexError: no such slot.
    """
    if weight.ndim != 2 or weight.dtype not in _DTYPES:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}, expected [out, in] of "
            f"{', '.join(map(str, _DTYPES))}."
        )
    if table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] != len(COLUMNS) or not table.is_contiguous():
        raise ValueError(
            f"table is {table.dtype} of shape {tuple(table.shape)}, expected contiguous int64 [slots, {len(COLUMNS)}]."
        )
    if table.device != weight.device:
        raise ValueError(f"weight is on {weight.device}, but the table on {table.device}.")
    if isinstance(slot, torch.Tensor):
        if slot.dtype not in (torch.int32, torch.int64) or slot.numel() != 1 or slot.device != weight.device:
            raise ValueError(
                f"slot is {slot.dtype} of shape {tuple(slot.shape)} on {slot.device}, expected int32 or int64 [1] on "
                f"{weight.device}."
            )
    elif not 0 <= slot < table.shape[0]:
        raise IndexError(f"slot {slot} is not one of the table's {table.shape[0]}.")
    for name, tensor, shape in (
        ("out", out, weight.shape),
        ("bias", bias, weight.shape[:1]),
        ("bias_out", bias_out, weight.shape[:1]),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, expected {tuple(shape)}.")
        if tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but weight is {weight.dtype} on {weight.device}."
            )
    if bias_out is not None and not bias_out.is_contiguous():
        raise ValueError(f"bias_out has strides {bias_out.stride()}; it has to be contiguous.")
