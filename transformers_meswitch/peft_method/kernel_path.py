"""One linear layer through the kernels: its table of experts, kept in step with the modules that own the tensors."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn

from meswitch_kernels import DeltaLeaves, ExpertTable, RowGroups, align_rows, delta_linear, fused_linear

from .. import ops
from .deltas import LinearDelta, QuantizedRowsDelta
from .live_choice import is_replayed
from .prefill_path import PrefillPath
from .slots import ROOM

__all__ = [
    "DTYPES",
    "MAX_ROWS",
    "KernelPath",
    "align_codes",
    "are_for_kernels",
    "is_plain_linear",
    "is_watched",
    "wants_gradients",
]

#: Rows of an input (tokens of all rows of the batch) up to which the kernels multiply by the codes themselves. With
#: more, writing an expert's weight once and multiplying on tensor cores is quicker.
MAX_ROWS = 16
#: What the kernels multiply.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class KernelPath:
    """Where the kernels find the experts of one linear layer, and the layer's product through them.

    The tensors stay the parameters of the :class:`~.deltas.LinearDelta` modules. Whoever gives those other tensors, or
    moves them, calls :meth:`place`.

    Args:
        out_features: output channels.
        in_features: input channels.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        self._out, self._in = out_features, in_features
        self._table: ExpertTable | None = None
        self._slots: dict[str, int] = {}
        self._biased: set[str] = set()
        self._prefill: PrefillPath | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin empty: the table holds addresses of this layer's tensors."""
        return {**self.__dict__, "_table": None, "_slots": {}, "_biased": set(), "_prefill": None}

    def place(self, expert: str, slot: int, delta: LinearDelta, base_bias: torch.Tensor | None) -> None:
        """Show the kernels an expert's tensors, if there are kernels for their device.

        Codes whose rows the kernels could not read are replaced by the same values in padded memory.

        Args:
            expert: its name.
            slot: its number.
            delta: its tensors.
            base_bias: ``[out]``, the base's bias, if the layer has one.
        """
        device = delta.codes.device
        self._retire_prefill()
        if not ops.runs_kernels(device):
            self._table = None
            return
        if self._table is None or self._table.rows.device != device:
            # The layer was moved, and all of its experts will be placed anew.
            self._slots, self._biased = {}, set()
            self._table = ExpertTable(ROOM, self._out, self._in, device)
        # What is compiled or captured does not know of a larger table; so many experts are rare.
        while slot >= self._table.slots:
            self._table = self._table.resized(2 * self._table.slots)
        align_codes(delta)
        bias = None
        if delta.record.bias:
            own = delta.bias.detach().float()
            bias = own if base_bias is None else own - base_bias.detach().float()
            self._biased.add(expert)
        self._table.set(slot, DeltaLeaves(bits=delta.record.bits, bias=bias, **delta.coded_leaves()))
        self._slots[expert] = slot

    def clear(self, expert: str) -> None:
        """Forget an expert, if it was placed."""
        slot = self._slots.pop(expert, None)
        self._biased.discard(expert)
        self._retire_prefill()
        if slot is not None and self._table is not None:
            self._table.clear(slot)

    def takes(self, x: torch.Tensor, base: nn.Module) -> bool:
        """Whether the kernels are for this input: few rows, of a dtype and device of theirs, and no gradients.

        Where Python is not asked again, also many rows, since nothing else sees another choice of experts.
        """
        return self._table is not None and are_for_kernels(x, self._table.rows.device, base)

    def prefill(self, x: torch.Tensor, base: nn.Module) -> PrefillPath | None:
        """The layer as scratch memory knows it, or `None` where the input is not for that.

        It is for any number of rows, of the dtype and on the device of a plain linear, without gradients.
        """
        if self._table is None or x.ndim < 2 or is_replayed() or not is_plain_linear(base, x):
            return None
        if not _fits_kernels(x, self._table.rows.device, base):
            return None
        if self._prefill is None or self._prefill.base is not base or not self._prefill.is_current():
            self._prefill = PrefillPath(base, self._table.rows, dict(self._slots), bool(self._biased))
        return self._prefill

    def _retire_prefill(self) -> None:
        if self._prefill is not None:
            self._prefill.retired = True
            self._prefill = None

    @property
    def rows(self) -> torch.Tensor | None:
        """The table, int64 ``[slots, columns]`` on the layer's device; `None` where there are no kernels."""
        return None if self._table is None else self._table.rows

    def multiply(self, x: torch.Tensor, base: nn.Module, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """``base(x) + x Δ̂ᵀ`` and the difference of biases, for inputs that it :meth:`takes`.

        Args:
            x: ``[..., in]``.
            base: the base's module.
            rows: the table.
            groups: the rows by expert.

        Returns:
            ``[..., out]`` of the dtype that the base's module returns.
        """
        flat = x.reshape(-1, self._in)
        if is_plain_linear(base, x):
            y = fused_linear(flat, base.weight, base.bias, rows, groups)
            return y.view(*x.shape[:-1], self._out)
        y = base(x)
        if y.dtype != x.dtype:
            return y + delta_linear(flat, None, rows, groups, out_features=self._out).view(y.shape).to(y.dtype)
        return delta_linear(flat, y.reshape(-1, self._out), rows, groups, out_features=self._out).view(y.shape)


def align_codes(delta: LinearDelta | QuantizedRowsDelta) -> None:
    """Replace codes whose rows the kernels could not read by the same values in padded memory."""
    aligned = align_rows(delta.codes.data)
    if aligned.data_ptr() != delta.codes.data_ptr():
        delta.codes = nn.Parameter(aligned, requires_grad=False)


def are_for_kernels(x: torch.Tensor, device: torch.device, base: nn.Module) -> bool:
    """Whether the kernels are for an input: few rows, of a dtype and device of theirs, and no gradients.

    Where Python is not asked again, also many rows, since nothing else sees another choice of experts.

    Args:
        x: ``[..., in]``.
        device: where the layer's table is.
        base: the base's module.
    """
    return (x.numel() <= MAX_ROWS * x.shape[-1] or is_replayed()) and _fits_kernels(x, device, base)


def _fits_kernels(x: torch.Tensor, device: torch.device, base: nn.Module) -> bool:
    """Whether an input, of however many rows, is of a dtype and device of the kernels, and without gradients."""
    return (
        x.device == device
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled(x.device.type)
        and not wants_gradients(x, base)
    )


def wants_gradients(x: torch.Tensor, base: nn.Module) -> bool:
    """Whether what a layer makes of an input is to be differentiated by it or by the base's parameters."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in base.parameters()))


def is_watched(base: nn.Module) -> bool:
    """Whether a module's call does more than its forward: there are hooks of accelerate, or of whoever looks at it."""
    return bool(base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__)


def is_plain_linear(base: nn.Module, x: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Whether a base's module does nothing but multiply by its weight, so that a kernel may do it in its place."""
    if type(base) is not nn.Linear or is_watched(base):
        return False
    weight = base.weight
    return type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.device == x.device
