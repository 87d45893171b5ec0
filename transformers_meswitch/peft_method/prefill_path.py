"""Linear layers of many rows: multiplied by an expert's weight in chunks, while the next chunk is being written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from meswitch_kernels import PrefillLayer, ScratchRing, prefill_linear

__all__ = ["PrefillPath", "PrefillScratch"]

#: Slot of an expert in a layer, or `None` for the base alone; and its rows, int64 ``[rows]``, or `None` for all.
SlotGroup = tuple[int | None, torch.Tensor | None]


class PrefillPath:
    """One linear layer as the scratch memory knows it, and the layer that came after it.

    Attributes:
        base: the base's module.
        slots: numbers of the experts that change this layer.
        after: the layer that followed in the last call of the model; `None` for the last one, and before any call.
        retired: whether the table says other things by now, or is not read any more.
    """

    def __init__(self, base: nn.Linear, table: torch.Tensor, slots: dict[str, int], expert_bias: bool) -> None:
        self.base = base
        self.slots = slots
        self.after: PrefillPath | None = None
        self.retired = False
        self._layer = PrefillLayer(base.weight, table, base.bias, expert_bias)

    def is_current(self) -> bool:
        """Whether base and experts still have the tensors that they had."""
        return not self.retired and self.base.weight is self._layer.weight and self.base.bias is self._layer.bias

    def multiply(
        self, x: torch.Tensor, groups: Sequence[tuple[str | None, torch.Tensor | None]], scratch: PrefillScratch
    ) -> torch.Tensor:
        """``x (W + Δ̂)ᵀ`` and both biases, each row with its own expert's weight, rounded to the weight's dtype.

        Args:
            x: ``[batch, ..., in]`` of the dtype and device of the base's weight, without gradients.
            groups: experts and their rows, as of :meth:`~.switch.ExpertSwitch.groups`; one of them changes this layer.
            scratch: that of the model on this device.

        Returns:
            ``[batch, ..., out]``.
        """
        following = scratch.follow(self)
        then = None
        if following is not None and following.is_current():
            first = next((slot for slot, _ in following._by_slot(groups) if slot is not None), None)
            then = None if first is None else (following._layer, first)
        return prefill_linear(x, self._layer, self._by_slot(groups), scratch.ring, then=then)

    def _by_slot(self, groups: Sequence[tuple[str | None, torch.Tensor | None]]) -> list[SlotGroup]:
        return [(None if expert is None else self.slots.get(expert), rows) for expert, rows in groups]


class PrefillScratch:
    """Scratch memory of a model on one device: room for two chunks of a weight; of few rows, for two whole weights.

    Args:
        device: of the layers.
    """

    def __init__(self, device: torch.device) -> None:
        self.ring = ScratchRing(device)
        self._thread = threading.local()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of the model, in which layers are taken to come in the order of the last one.

        Outside of it nothing is written ahead, since an expert may change before the next layer is called.
        """
        before = getattr(self._thread, "calling", None)
        calling: list[PrefillPath] = []
        self._thread.calling = calling
        try:
            yield
        finally:
            self._thread.calling = before
            if calling:
                self.ring.discard()

    def follow(self, layer: PrefillPath) -> PrefillPath | None:
        """Take note that a layer comes now.

        Returns:
            The one that will come next, if the order is that of the last call.
        """
        calling: list[PrefillPath] | None = getattr(self._thread, "calling", None)
        if calling is None:
            return None
        if calling:
            calling[0].after = layer
        # The last one only: what came before has been followed.
        calling[:] = [layer]
        return layer.after
