"""Wrapped small modules (norms), which an expert runs with its own parameters."""

from __future__ import annotations

import copy
import operator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler import is_compiling

from .. import ops
from .deltas import ValuesDelta
from .layer import MESwitchLayer
from .live_choice import is_replayed
from .made_of import MadeOf
from .switch import ExpertSwitch, join_rows, take_rows
from .values_stack import ValuesStack, run_with_rows, takes_rows

__all__ = ["ValuesLayer"]


class _View(NamedTuple):
    """A norm as its last expert sees it, and what that was made of: a copy takes longer than a small norm does."""

    expert: str
    module: nn.Module
    base: nn.Module
    attributes: tuple[Any, ...]
    delta: ValuesDelta
    made_of: MadeOf

    def is_of(self, base: nn.Module, delta: ValuesDelta | None) -> bool:
        """Whether it was made of these, as they are now."""
        return (
            self.base is base
            and self.delta is delta
            and len(self.attributes) == len(base.__dict__)
            and all(map(operator.is_, self.attributes, base.__dict__.values()))
            and self.made_of.still(_tensors(base, self.delta.values))
        )


def _tensors(*modules: nn.Module) -> list[torch.Tensor]:
    return [tensor for module in modules for tensor in module._parameters.values() if tensor is not None]


class ValuesLayer(MESwitchLayer):
    """A small module (a norm) that an expert runs with its own parameters."""

    stack: ValuesStack | None

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__(base_layer, switch)
        self.stack = None
        self._last: _View | None = None

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
        base = self.wrapped
        last = None if is_compiling() else self._last
        sole = last is not None and last.expert == self.switch.sole_expert
        if last is not None and sole and last.is_of(base, self.delta_of(last.expert)):
            return last.module(x, *args, **kwargs)
        groups = self.switch.groups(x.shape[0], x.device)
        if self.merged_adapters or all(self.delta_of(expert) is None for expert, _ in groups):
            return base(x, *args, **kwargs)
        parts = [(rows, self._module(base, expert)(take_rows(x, rows), *args, **kwargs)) for expert, rows in groups]
        return join_rows(parts, x.shape[0])

    def _module(self, base: nn.Module, expert: str | None) -> nn.Module:
        """The base's module seen with the expert's parameters: a shallow copy, so that threads do not swap weights."""
        delta = self.delta_of(expert)
        if delta is None or expert is None:
            return base
        view = copy.copy(base)
        # accelerate's hook is a bound ``forward`` of the original module; the copy must use its own.
        view.__dict__.pop("forward", None)
        if is_compiling():
            view._parameters = self._whole(base, delta)  # type: ignore[assignment]
            return view
        made_of = MadeOf.now(_tensors(base, delta.values))
        # What is cast in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            view._parameters = self._whole(base, delta)  # type: ignore[assignment]
        # What was cast for a call that is differentiated is part of its graph.
        if made_of is not None and all(tensor.is_leaf for tensor in _tensors(view)):
            self._last = _View(expert, view, base, tuple(base.__dict__.values()), delta, made_of)
        return view

    def drop_cache(self) -> None:
        """As of every wrapped layer."""
        self._last = None

    def _whole(self, base: nn.Module, delta: ValuesDelta) -> dict[str, torch.Tensor | None]:
        """All parameters of the expert's module: a delta lists those that differ from the base's."""
        return {**base._parameters, **self._own(base, delta)}

    def _own(self, base: nn.Module, delta: ValuesDelta) -> dict[str, torch.Tensor]:
        of_base = base._parameters
        return {
            name: value.to(of_base[name].dtype)  # type: ignore[union-attr]
            for name, value in delta.values._parameters.items()
        }

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """The expert's own parameters."""
        delta = self.stored_delta(expert)
        assert isinstance(delta, ValuesDelta)
        return {name: value.detach().clone() for name, value in self._own(self.get_base_layer(), delta).items()}
