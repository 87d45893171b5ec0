"""What makes experts quick on a CPU: their dense weights, kept from call to call while the same experts answer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F

from .deltas import LinearDelta, QuantizedRowsDelta, StoredDelta
from .host_memory import free_share
from .kernel_path import DTYPES, is_plain_linear, is_watched, wants_gradients
from .made_of import MadeOf
from .switch import ExpertSwitch

__all__ = ["DenseCache", "takes_whole", "takes_whole_head"]

#: Nothing is kept when less than this share of the memory is free.
_FREE = 0.25


class DenseCache:
    """The dense weights of the experts that answered a layer's last call.

    Each takes as much memory as the layer's weight. Of a plain linear it is the sum of its weight and the delta, which
    in half precision is rounded once, as merging rounds it and as the fine-tune's own weight was; of others it is the
    delta alone.
    """

    def __init__(self) -> None:
        # Replaced as a whole, never changed, since threads may answer at once.
        self._kept: dict[StoredDelta, tuple[torch.dtype, MadeOf, torch.Tensor]] = {}
        self._last: tuple[str, nn.Linear, LinearDelta] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin empty."""
        return {"_kept": {}, "_last": None}

    def clear(self) -> None:
        """Give the memory back: what was kept is of tensors that go, move or are not asked any more."""
        self._kept, self._last = {}, None

    def keep_only(self, deltas: Collection[StoredDelta | None]) -> None:
        """Give back the memory of all experts but those that answer now, before more is made."""
        if any(delta not in deltas for delta in self._kept):
            self._kept = {delta: kept for delta, kept in self._kept.items() if delta in deltas}

    def has_room(self, deltas: Collection[StoredDelta]) -> bool:
        """Whether what is made of these deltas is there, or may be kept once it is."""
        return all(delta in self._kept for delta in deltas) or free_share() >= _FREE

    def again(
        self, x: torch.Tensor, base: nn.Module, switch: ExpertSwitch, delta_of: Callable[[str], Any]
    ) -> torch.Tensor | None:
        """What :meth:`whole` gives, by the shortest way there is, if the layer's last call was of the same expert.

        A small model's product takes as long as a dozen of Python's calls.

        Args:
            x: ``[..., in]``.
            base: the base's module.
            switch: the model's.
            delta_of: the layer's, by an expert's name.

        Returns:
            ``[..., out]``; `None` if it is not as simple as that.
        """
        last = self._last
        if last is None or last[1] is not base or not self.takes(x, base) or last[0] != switch.sole_expert:
            return None
        expert, module, delta = last
        kept = self._kept.get(delta)
        # Others that are kept are given back on the long way, and the expert may have been loaded anew.
        if kept is None or len(self._kept) > 1 or delta_of(expert) is not delta or is_watched(module):
            return None
        dtype, made_of, dense = kept
        # Past ``__getattr__``, as all here is for the sake of some microseconds.
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if weight is None or dtype != x.dtype or not made_of.still([*delta.leaves, weight]):
            return None
        return F.linear(x, dense, delta.bias.to(dtype) if delta.record.bias else bias)

    def takes(self, x: torch.Tensor, base: nn.Module) -> bool:
        """Whether this is for such inputs: on a CPU, without autocast and gradients, and not while being traced."""
        return (
            type(x) is torch.Tensor
            and x.is_cpu
            and not torch.is_autocast_enabled("cpu")
            and not wants_gradients(x, base)
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        )

    def whole(self, x: torch.Tensor, base: nn.Linear, expert: str, delta: LinearDelta) -> torch.Tensor:
        """The expert's output with its bias, of a base that :func:`takes_whole`.

        Args:
            x: ``[..., in]``.
            base: the base's module.
            expert: its name.
            delta: the expert's.

        Returns:
            ``[..., out]`` of the dtype of ``x``.
        """
        weight = base.weight
        dense = self._get(delta, x.dtype, lambda: delta.merged_into(weight), weight)
        self._last = expert, base, delta
        return F.linear(x, dense, delta.bias.to(x.dtype) if delta.record.bias else base.bias)

    def part(self, x: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
        """``x Δ̂ᵀ``: ``[..., in]`` to ``[..., out]``."""
        return F.linear(x, self._get(delta, x.dtype, lambda: delta.weight(x.dtype)))

    def whole_head(self, hidden: torch.Tensor, base: nn.Module, delta: QuantizedRowsDelta) -> torch.Tensor:
        """The expert's logits ``[..., num_rows]`` by one product, of heads that :func:`takes_whole_head`.

        Args:
            hidden: ``[..., width]``.
            base: the base's output head.
            delta: the expert's.
        """
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        return F.linear(hidden, self._get(delta, hidden.dtype, lambda: delta.dense(weight), weight))

    def rows(self, hidden: torch.Tensor, delta: QuantizedRowsDelta) -> torch.Tensor:
        """The dense delta of an output head's coded rows, ``[coded, width]`` of the dtype of ``hidden``."""
        return self._get(delta, hidden.dtype, lambda: delta.coded_delta(hidden.dtype))

    def _get(
        self, delta: StoredDelta, dtype: torch.dtype, make: Callable[[], torch.Tensor], *others: torch.Tensor
    ) -> torch.Tensor:
        """What ``make`` gives, unless it did so before for the delta's tensors and ``others`` as they are now."""
        tensors = [*delta.leaves, *others]
        kept = self._kept.get(delta)
        if kept is not None and kept[0] == dtype and kept[1].still(tensors):
            return kept[2]
        made_of = MadeOf.now(tensors)
        if made_of is None:
            return make()
        # The next one may have its memory.
        del kept
        self._kept = {known: dense for known, dense in self._kept.items() if known is not delta}
        # A tensor made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            dense = make()
        if free_share() >= _FREE:
            self._kept = {**self._kept, delta: (dtype, made_of, dense)}
        return dense


def takes_whole(base: nn.Module, x: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Whether one product with the sum of weight and delta, added in float32, is as exact as the input's dtype."""
    return x.dtype in DTYPES and is_plain_linear(base, x)


def takes_whole_head(hidden: torch.Tensor, base: nn.Module, delta: nn.Module | None) -> bool:
    """Whether an expert's logits are those of one dense matrix: no biases, and a base that only multiplies."""
    return (
        isinstance(delta, QuantizedRowsDelta)
        and takes_whole(base, hidden)
        and base.bias is None
        and not delta.record.bias
    )
