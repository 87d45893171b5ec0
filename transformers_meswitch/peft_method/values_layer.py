"""Wrapped small modules (norms), which an expert runs with its own parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .. import ops
from .deltas import ValuesDelta
from .layer import MESwitchLayer
from .live_choice import is_replayed
from .switch import ExpertSwitch
from .values_stack import ValuesStack, run_with_rows, takes_rows

__all__ = ["ValuesLayer"]


class ValuesLayer(MESwitchLayer):
    """A small module (a norm) that an expert runs with its own parameters."""

    stack: ValuesStack | None

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__(base_layer, switch)
        self.stack = None

    @property
    def has_table(self) -> bool:
        """Whether the experts' parameters are in a stack."""
        return self.stack is not None

    def settle(self, expert: str) -> None:
        """Enter the expert's parameters in the stack, where there are kernels and rows can have parameters apart."""
        base, delta = self.get_base_layer(), self.delta_of(expert)
        device = next(base.parameters()).device
        if delta is None or not ops.runs_kernels(device):
            return
        self.switch.live_on(device)
        if self.stack is None and takes_rows(base):
            self.stack = ValuesStack(base)
        if self.stack is not None:
            self.stack.ask(base)
            self.stack.put(expert, self.switch.slots.of(expert), self._whole(base, delta))

    def delete_adapter(self, adapter_name: str) -> None:
        """As of every wrapped layer; the stack forgets the expert, too."""
        if self.stack is not None:
            self.stack.clear(adapter_name)
        super().delete_adapter(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Shape and dtype as the base's module."""
        if self.stack is not None and is_replayed() and not (self.merged_adapters or args or kwargs):
            base, index = self.get_base_layer(), self.switch.live_on(x.device).index(x.shape[0])
            if base is self.base_layer and self.stack.norms(base, x):
                return self.stack.norm(base, x, index)
            return run_with_rows(self.base_layer, x, self.stack.pick(base, index))
        groups = self.switch.groups(x.shape[0], x.device)
        if self.merged_adapters or all(self.delta_of(expert) is None for expert, _ in groups):
            return self.base_layer(x, *args, **kwargs)
        if groups[0][1] is None:
            return self._module(groups[0][0])(x, *args, **kwargs)
        parts = [(rows, self._module(expert)(x[rows], *args, **kwargs)) for expert, rows in groups]
        out = x.new_empty(x.shape[0], *parts[0][1].shape[1:], dtype=parts[0][1].dtype)
        for rows, part in parts:
            out[rows] = part
        return out

    def _module(self, expert: str | None) -> nn.Module:
        """The base's module seen with the expert's parameters: a shallow copy, so that threads do not swap weights."""
        base = self.base_layer
        delta = self.delta_of(expert)
        if delta is None:
            return base
        view = copy.copy(base)
        # accelerate's hook is a bound ``forward`` of the original module; the copy must use its own.
        view.__dict__.pop("forward", None)
        view._parameters = self._whole(base, delta)  # type: ignore[assignment]
        return view

    def _whole(self, base: nn.Module, delta: ValuesDelta) -> dict[str, torch.Tensor | None]:
        """All parameters of the expert's module: a delta lists those that differ from the base's."""
        return {**base._parameters, **self._own(delta)}

    def _own(self, delta: ValuesDelta) -> dict[str, torch.Tensor]:
        base = self.get_base_layer()._parameters
        return {
            name: value.to(base[name].dtype)  # type: ignore[union-attr]
            for name, value in delta.values.named_parameters(recurse=False)
        }

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """The expert's own parameters."""
        delta = self.stored_delta(expert)
        assert isinstance(delta, ValuesDelta)
        return {name: value.detach().clone() for name, value in self._own(delta).items()}
