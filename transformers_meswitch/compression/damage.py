"""What the error of one weight does to the output of its decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..module_kinds import is_conv1d

__all__ = ["LayerDamage", "in_float32"]


class LayerDamage:
    """A decoder layer on a few sequences, run in float32, since the errors of a good delta drown in the rounding of 16
    bits.

    Args:
        run: from the place of a sequence batch to the layer's output for it, float32 ``[rows, length, hidden]``.
        real: for each batch, bool ``[rows, length]``: which positions hold a token.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.eye(2))
    >>> damage = LayerDamage(lambda i: layer(torch.tensor([[[3.0, 4.0]]])), [torch.tensor([[True]])])
    >>> round(damage.of(layer, torch.tensor([[0.5, 0.0], [0.0, 0.0]])), 6)  # 1.5² / (3² + 4²)
    0.09
    """

    def __init__(self, run: Callable[[int], Tensor], real: Sequence[Tensor]) -> None:
        self._run, self._real = run, real
        self._outputs = [self._real_outputs(i) for i in range(len(real))]

    def of(self, module: nn.Module, error: Tensor) -> float:
        """Mean over tokens of ``‖h' − h‖² / ‖h‖²``, ``h'`` being the layer's output with an error in one weight.

        Args:
            module: a linear of the layer, its weight in float32; as before when this returns.
            error: float32 ``[out, in]``, what is added to the weight.
        """
        with _changed(module, error):
            changed = [self._real_outputs(i) for i in range(len(self._real))]
        ratios = [
            (other - one).square().sum(dim=-1) / one.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            for one, other in zip(self._outputs, changed, strict=True)
        ]
        return float(torch.cat(ratios).cpu().double().mean())

    @torch.no_grad()
    def _real_outputs(self, i: int) -> Tensor:
        output = self._run(i)
        return output[self._real[i].to(output.device)]


@contextmanager
def _changed(module: nn.Module, error: Tensor) -> Any:
    weight = module._parameters["weight"]
    assert weight is not None
    change = error.to(weight.device)
    module._parameters["weight"] = nn.Parameter(
        weight.data + (change.T if is_conv1d(module) else change), requires_grad=False
    )
    try:
        yield
    finally:
        module._parameters["weight"] = weight


def in_float32(value: Any) -> Any:
    """Floating tensors, in nested tuples, lists and dictionaries too, in float32; all else as it is.

    >>> in_float32((torch.ones(1, dtype=torch.bfloat16), {"a": 3}))
    (tensor([1.]), {'a': 3})
    """
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(in_float32, value))
    if isinstance(value, dict):
        return {key: in_float32(item) for key, item in value.items()}
    return value
