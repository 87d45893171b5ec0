"""A wrapped linear layer: the base's product, and for each expert in the batch its delta's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..module_kinds import is_conv1d, linear_sizes
from .deltas import LinearDelta
from .dense_cache import DenseCache, takes_whole
from .joint_linears import JointLinears
from .kernel_path import KernelPath
from .layer import MESwitchLayer
from .naming import module_key
from .switch import ExpertSwitch, RowGroup, join_rows, take_rows

__all__ = ["LinearLayer"]


class LinearLayer(MESwitchLayer):
    """A linear (``nn.Linear``, ``Conv1D``, bitsandbytes 4/8-bit): ``y = base(x) + x Δ̂ᵀ`` per row's expert.

    Attributes:
        joint: this and other linears that the module around them gives the same input, if there are any.
    """

    kernel_table: torch.Tensor | None

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__(base_layer, switch)
        self.out_features, self.in_features = linear_sizes(base_layer)
        self._kernels = KernelPath(self.out_features, self.in_features)
        self._dense = DenseCache()
        self.joint: JointLinears | None = None
        # A buffer, so that compiled code takes it for something that stays where it is.
        self.register_buffer("kernel_table", None, persistent=False)

    @property
    def has_table(self) -> bool:
        """Whether there are kernels for the layer."""
        return self.kernel_table is not None

    def settle(self, expert: str) -> None:
        """Show the kernels where the expert's tensors are, unless something stands in for a delta here."""
        delta = self.delta_of(expert)
        if delta is not None and all(isinstance(found, LinearDelta) for found in self.meswitch_delta.values()):
            base_bias = getattr(self.get_base_layer(), "bias", None)
            self._kernels.place(expert, self.switch.slots.of(expert), delta, base_bias)
            self.kernel_table = self._kernels.rows
            self._forget_kept()
            if self.kernel_table is not None:
                self.switch.live_on(self.kernel_table.device)
                self.switch.scratch_on(self.kernel_table.device)

    def drop_cache(self) -> None:
        """As of every wrapped layer."""
        self._dense.clear()
        self._forget_kept()

    def _forget_kept(self) -> None:
        if self.joint is not None:
            self.joint.forget()

    def takes_kernels(self, x: torch.Tensor) -> bool:
        """Whether the kernels multiply this input."""
        return self._kernels.takes(x, self.base_layer)

    def stand_in(self, expert: str, delta: nn.Module) -> None:
        """Let another module answer for an expert's delta: called as one, with a ``record`` and maybe a ``bias``.

        What kernels and the cache know of the layer's experts is forgotten, and the module is called instead.
        """
        self.meswitch_delta[module_key(expert)] = delta
        self._kernels = KernelPath(self.out_features, self.in_features)
        self.kernel_table = None
        self.drop_cache()

    def delete_adapter(self, adapter_name: str) -> None:
        """As of every wrapped layer; the kernels forget the expert, too."""
        self._kernels.clear(adapter_name)
        super().delete_adapter(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[batch, ..., in]`` to ``[batch, ..., out]``, in the dtype that the base's module returns."""
        base, plain = self.wrapped, not (args or kwargs)
        if plain and self._kernels.rows is None:
            again = self._dense.again(x, base, self.switch, self.delta_of)
            if again is not None:
                return again
        if self._kernels.takes(x, base) and plain and not self.merged_adapters:
            by_expert = self.switch.kernel_groups(x.shape[0], math.prod(x.shape[1:-1]), x.device)
            if by_expert is None:
                return base(x)
            assert self.kernel_table is not None
            together = None if self.joint is None else self.joint.take(self, x, by_expert)
            if together is not None:
                return together
            return self._kernels.multiply(x, base, self.kernel_table, by_expert)
        groups = self.switch.groups(x.shape[0], x.device)  # refuses rows of others than the expert that is merged
        deltas = [self.delta_of(expert) for expert, _ in groups]
        if self.merged_adapters or all(delta is None for delta in deltas):
            return base(x, *args, **kwargs)
        prefill = self._kernels.prefill(x, base) if plain else None
        if prefill is not None:
            return prefill.multiply(x, groups, self.switch.scratch_on(x.device))
        dense = plain and self._dense.takes(x, base) and all(isinstance(d, LinearDelta | None) for d in deltas)
        if dense:
            self._dense.keep_only(deltas)
            if takes_whole(base, x):
                return self._by_whole_weights(x, base, groups, deltas)
        y = base(x, *args, **kwargs)
        for delta, (_, rows) in zip(deltas, groups, strict=True):
            if delta is None:
                continue
            own = take_rows(x, rows)
            part = self._with_bias(self._dense.part(own, delta) if dense else delta(own), delta).to(y.dtype)
            y = y + part if rows is None else y.index_add(0, rows, part)
        return y

    def _by_whole_weights(
        self, x: torch.Tensor, base: nn.Linear, groups: list[RowGroup], deltas: list[LinearDelta | None]
    ) -> torch.Tensor:
        """``[batch, ..., in]`` to ``[batch, ..., out]``: a product for each expert, and one where none differs."""
        parts, others = [], []
        for delta, (expert, rows) in zip(deltas, groups, strict=True):
            if delta is not None and expert is not None:
                parts.append((rows, self._dense.whole(take_rows(x, rows), base, expert, delta)))
            elif rows is not None:
                others.append(rows)
        if others:
            together = torch.cat(others)
            parts.append((together, base(x[together])))
        return join_rows(parts, x.shape[0])

    def _with_bias(self, y: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
        """Output ``[..., out]`` of a delta, and of the base or not, with the difference of biases."""
        if not delta.record.bias:
            return y
        own = delta.bias.float()
        base = getattr(self.get_base_layer(), "bias", None)
        return y + (own if base is None else own - base.float()).to(y.dtype)

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """Weight ``W + Δ̂``, added in float32, and the expert's own bias."""
        base, delta = self.get_base_layer(), self.stored_delta(expert)
        assert isinstance(delta, LinearDelta)
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        merged_weight = delta.merged_into(weight.T).T if is_conv1d(base) else delta.merged_into(weight)
        merged = {"weight": merged_weight.contiguous()}
        if delta.record.bias:
            merged["bias"] = delta.bias.to(weight.dtype)
        return merged
