"""What makes one expert quick on a CPU: the dense delta of the expert that answered last, kept from call to call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .deltas import LinearDelta, QuantizedRowsDelta
from .host_memory import free_share
from .kernel_path import is_plain_linear, wants_gradients

__all__ = ["DenseCache"]

#: Nothing is kept when less than this share of the memory is free.
_FREE = 0.25


class DenseCache:
    """The dense delta of a layer's last expert, or in float32 the sum of the base's weight and it.

    Takes as much memory as the layer's weight. In half precision the sum is not used: rounding it would change
    answers, as merging does.
    """

    def __init__(self) -> None:
        self._kept: tuple[torch.dtype, list[torch.Tensor], list[int], torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin empty."""
        return {"_kept": None}

    def clear(self) -> None:
        """Give the memory back: what was kept is of tensors that go, move or are not asked any more."""
        self._kept = None

    def takes(self, x: torch.Tensor, base: nn.Module) -> bool:
        """Whether this is for such inputs: on a CPU, without autocast and gradients, and not while being traced."""
        return (
            type(x) is torch.Tensor
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and not wants_gradients(x, base)
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        )

    def multiply(self, x: torch.Tensor, base: nn.Module, delta: LinearDelta) -> torch.Tensor:
        """``base(x) + x Δ̂ᵀ``, without the expert's bias.

        Args:
            x: ``[..., in]``.
            base: the base's module.
            delta: the expert's.

        Returns:
            ``[..., out]`` of the dtype that the base's module returns.
        """
        leaves = list(delta.parameters())
        if is_plain_linear(base, x) and x.dtype == torch.float32:
            weight = base.weight
            return F.linear(x, self._get([*leaves, weight], x, lambda: delta.weight(x.dtype).add_(weight)), base.bias)
        y: torch.Tensor = base(x)
        return y + F.linear(x, self._get(leaves, x, lambda: delta.weight(x.dtype))).to(y.dtype)

    def whole_head(self, hidden: torch.Tensor, base: nn.Module, delta: QuantizedRowsDelta) -> torch.Tensor | None:
        """The expert's logits ``[..., num_rows]`` by one product, where that is no less exact; else `None`.

        Args:
            hidden: ``[..., width]``.
            base: the base's output head.
            delta: the expert's.
        """
        if not is_plain_linear(base, hidden) or hidden.dtype != torch.float32:
            return None
        if base.bias is not None or delta.record.bias:
            return None
        weight = base.weight
        made_of = [*delta.parameters(), weight]
        return F.linear(hidden, self._get(made_of, hidden, lambda: delta.dense(weight)))

    def rows(self, hidden: torch.Tensor, delta: QuantizedRowsDelta) -> torch.Tensor:
        """The dense delta of an output head's coded rows, ``[coded, width]`` of the dtype of ``hidden``."""
        return self._get(delta.parameters(), hidden, lambda: delta.coded_delta(hidden.dtype))

    def _get(self, made_of: Iterable[torch.Tensor], x: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``make`` gives, unless it did so for the same tensors in the same state before.

        The tensors are held as long as what was made of them, so that no other can have taken their place.
        """
        tensors = list(made_of)
        if any(tensor.is_inference() for tensor in tensors):
            # They do not say when they change.
            return make()
        versions = [tensor._version for tensor in tensors]
        kept = self._kept
        if (
            kept is not None
            and (kept[0], kept[2]) == (x.dtype, versions)
            and len(kept[1]) == len(tensors)
            and all(map(operator.is_, kept[1], tensors))
        ):
            return kept[3]
        self._kept = kept = None  # the next one may have its memory
        # A tensor made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            dense = make()
        if free_share() >= _FREE:
            self._kept = x.dtype, tensors, versions, dense
        return dense
