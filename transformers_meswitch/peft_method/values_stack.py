"""A small module (a norm) run with each row's own parameters at once, picked from a stack by the expert's slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from .slots import ROOM

__all__ = ["ValuesStack", "run_with_rows", "takes_rows"]


class ValuesStack(nn.Module):
    """The experts' own parameters of a small module, by slot, for code that picks them by tensors alone.

    A second copy of a few thousand numbers an expert, so that no loop over experts is needed. The last row is the
    base's: it has nothing of its own, and -1 is its index.

    Args:
        base: the base's module.
    """

    has: torch.Tensor

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        first = next(base.parameters())
        self.register_buffer("has", torch.zeros(ROOM + 1, dtype=torch.bool, device=first.device), persistent=False)
        self._names = [name for name, _ in base.named_parameters(recurse=False)]
        self._slots: dict[str, int] = {}
        for name, parameter in base.named_parameters(recurse=False):
            self.register_buffer(f"of_{name}", parameter.new_zeros(ROOM + 1, *parameter.shape), persistent=False)

    def put(self, expert: str, slot: int, values: Mapping[str, torch.Tensor]) -> None:
        """Enter an expert: its name, its slot, and its own parameters by name.

        Raises:
            IndexError: no room for so many experts.
        """
        if slot >= ROOM:
            raise IndexError(f"slot {slot} is not one of {ROOM}.")
        for name, value in values.items():
            getattr(self, f"of_{name}")[slot].copy_(value)
        self.has[slot] = True
        self._slots[expert] = slot

    def clear(self, expert: str) -> None:
        """Forget an expert, if it was entered."""
        slot = self._slots.pop(expert, None)
        if slot is not None:
            self.has[slot] = False

    def pick(self, base: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameters ``[rows, *shape]`` of each row's expert by name, or the base's.

        Args:
            base: the base's module.
            index: int32 ``[rows]``, slots, -1 for the base.
        """
        # Each of these is a kernel of microseconds in a step that has two norms a layer, so they are few.
        own = self.has[index]
        picked = {}
        for name in self._names:
            rows = getattr(self, f"of_{name}")[index]
            picked[name] = torch.where(own.view(-1, *[1] * (rows.ndim - 1)), rows, getattr(base, name))
        return picked


def run_with_rows(module: nn.Module, x: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``module(x)`` where row ``i`` of the batch has ``parameters[...][i]``.

    Args:
        module: the base's module; of those that :func:`takes_rows`.
        x: ``[batch, ..., *shape]``.
        parameters: name to ``[batch, *shape]``, all parameters of the module.

    Returns:
        As ``module(x)``.
    """
    spread = {
        name: rows.view(rows.shape[0], *[1] * (x.ndim - rows.ndim), *rows.shape[1:])
        for name, rows in parameters.items()
    }
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        # torch's operators take one weight, which they apply before they round.
        if isinstance(module, nn.LayerNorm):
            y = F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)
        else:
            eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
            y = F.rms_norm(x.float(), module.normalized_shape, eps=eps)
        if "weight" in spread:
            y = y * spread["weight"].float()
        if "bias" in spread:
            y = y + spread["bias"].float()
        return y.to(x.dtype)
    result: torch.Tensor = functional_call(module, spread, (x,))
    return result


@torch.no_grad()
def takes_rows(module: nn.Module) -> bool:
    """Whether :func:`run_with_rows` gives each row what the module alone gives it, tried on numbers.

    So it is with norms of transformers' models, which end in a product with their weight; it need not be with any
    module.

    >>> takes_rows(nn.LayerNorm(8)), takes_rows(nn.Conv1d(3, 3, 1))
    (True, False)
    """
    own = dict(module.named_parameters(recurse=False))
    if not own or len(own) != len(list(module.parameters())):
        return False
    shape = max((p.shape for p in own.values()), key=len)
    device, dtype = next(iter(own.values())).device, next(iter(own.values())).dtype
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    rows: dict[str, Any] = {name: torch.stack([draw(*p.shape) for _ in range(2)]) for name, p in own.items()}
    x = draw(2, 3, *shape)
    try:
        together = run_with_rows(module, x, rows)
        apart = [functional_call(module, {k: v[i] for k, v in rows.items()}, (x[i : i + 1],)) for i in range(2)]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = torch.cat(apart)
    return together.shape == expected.shape and torch.allclose(
        together.float(), expected.float(), rtol=2e-2, atol=1e-2
    )
