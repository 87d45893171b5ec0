"""Linears of a module that multiply the same input, such as an attention's queries, keys and values, in one launch.

A module calls its linears one after the other. The first of them is answered together with the others, whose outputs
are kept until they are asked for the same input.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from meswitch_kernels import RowGroups, fused_linears

from .kernel_path import is_plain_linear
from .live_choice import is_replayed

if TYPE_CHECKING:
    from .linear_layer import LinearLayer

__all__ = ["JointLinears", "link_joint_linears"]

#: Names of linears that modules of transformers' models give the same input. Whether it is the same is looked at in
#: each call, so a name that is used otherwise somewhere (attention to another model's states) costs little time there.
_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: Inputs in a row of which not all outputs were asked for, after which a thread has each layer answer for itself.
_MOST_UNASKED = 2


@dataclass
class _Kept:
    """Outputs of one input that have not been asked for yet, by layer."""

    x: weakref.ref[torch.Tensor]
    version: int
    groups: RowGroups
    stream: tuple[Any, ...]
    outputs: dict[int, torch.Tensor]

    def are_of(self, x: torch.Tensor, groups: RowGroups) -> bool:
        return self.x() is x and self.version == x._version and self.groups is groups and self.stream == _stream_of(x)


class JointLinears:
    """Wrapped linears of one module that are given the same input.

    Args:
        layers: two or more, in the order in which the module calls them.
    """

    _of_thread: threading.local

    def __new__(cls, *args: Any) -> JointLinears:
        """As of any class, with nothing kept."""
        joint = super().__new__(cls)
        # There from the start, since a layer that is being copied forgets before this is filled.
        joint.forget()
        return joint

    def __init__(self, layers: Sequence[LinearLayer]) -> None:
        self._layers = list(layers)

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin with nothing kept."""
        return {"_layers": self._layers}

    def forget(self) -> None:
        """Drop what is kept, for instance because a layer's tensors are other ones now."""
        # Threads that generate at once have inputs of their own.
        self._of_thread = threading.local()

    def take(self, layer: LinearLayer, x: torch.Tensor, groups: RowGroups) -> torch.Tensor | None:
        """A layer's output, and those of the others to keep, in one launch; or what was kept of it.

        Args:
            layer: one of the layers, whose kernels take ``x``.
            x: ``[..., in]``.
            groups: the rows by expert.

        Returns:
            ``[..., out]`` of the dtype of ``x``; `None` where the layers have to be multiplied by apart: where one of
            them is no plain linear or has an input of another kind than kernels take; where a part of the model is
            compiled or captured rather than its call; and, unless ``torch.compile`` traces, in inference mode, whose
            tensors do not tell that they were written to, and where the module does not ask for all of them.
        """
        if torch.compiler.is_compiling():
            return self._take_traced(layer, x, groups)
        if torch.is_inference_mode_enabled() or x.is_inference():
            return None
        own = self._of_thread
        kept: _Kept | None = getattr(own, "kept", None)
        if kept is not None and kept.are_of(x, groups):
            y = kept.outputs.pop(id(layer), None)
            if y is not None:
                return y
        unasked: int = getattr(own, "unasked", 0)
        if kept is not None:
            unasked = unasked + 1 if kept.outputs else 0
            own.kept, own.unasked = None, unasked
        if unasked >= _MOST_UNASKED:
            return None
        if is_replayed() and layer.switch.live_on(x.device).worked_out is None:
            # Part of a model is captured, whose layers group rows for themselves.
            return None
        if not all(joins(other, x) for other in self._layers):
            return None
        outputs = {id(other): y for other, y in zip(self._layers, self._multiply(x, groups), strict=True)}
        y = outputs.pop(id(layer))
        own.kept = _Kept(weakref.ref(x), x._version, groups, _stream_of(x), outputs)
        return y

    def _take_traced(self, layer: LinearLayer, x: torch.Tensor, groups: RowGroups) -> torch.Tensor | None:
        """:meth:`take` for ``torch.compile``, which follows what is kept while it traces.

        It cannot tell that a tensor was written to, which no module of transformers does between these linears.
        """
        call = layer.switch.live_on(x.device).worked_out
        if call is None or not all(joins(other, x) for other in self._layers):
            return None
        # Modules are keys that all releases of torch trace.
        key = self._layers[0]
        if key not in call:
            call[key] = x, dict(zip(self._layers, self._multiply(x, groups), strict=True))
        of, outputs = call[key]
        if of is not x or layer not in outputs:
            # Of another input, like keys and values of an image's states: the rest of them apart.
            return None
        y = outputs.pop(layer)
        if not outputs:
            del call[key]  # code with graph breaks would hold on to it until the call ends
        return y

    def _multiply(self, x: torch.Tensor, groups: RowGroups) -> list[torch.Tensor]:
        """All layers' outputs ``[..., out]`` in one launch."""
        bases: list[Any] = [other.base_layer for other in self._layers]
        flat = fused_linears(
            x.reshape(-1, x.shape[-1]),
            [base.weight for base in bases],
            [base.bias for base in bases],
            [other.kernel_table for other in self._layers],  # type: ignore[misc]  # as they join
            groups,
        )
        return [y.view(*x.shape[:-1], y.shape[1]) for y in flat]


def _stream_of(x: torch.Tensor) -> tuple[Any, ...]:
    """Where what is worked out of a tensor can be used at once: the stream, and whether a graph is captured there."""
    if not x.is_cuda:
        return ()
    return torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()


def joins(layer: LinearLayer, x: torch.Tensor) -> bool:
    """Whether a layer's output can come from a launch with others'."""
    return (
        layer.kernel_table is not None
        and not layer.merged_adapters
        and layer.takes_kernels(x)
        and is_plain_linear(layer.base_layer, x)
    )


def link_joint_linears(model: nn.Module) -> None:
    """Let the wrapped linears of each module that are given the same input know each other, and only those."""
    from .linear_layer import LinearLayer

    for module in model.modules():
        for names in _NAMES:
            layers = [child for name in names if isinstance(child := module._modules.get(name), LinearLayer)]
            for width in {layer.in_features for layer in layers}:
                alike = [layer for layer in layers if layer.in_features == width]
                joint = JointLinears(alike) if len(alike) > 1 else None
                for layer in alike:
                    layer.joint = joint
