"""Which linears of a decoder layer write into its residual stream, found by watching it run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, nn

from .layered_model import hidden_of

__all__ = ["LayerWiring", "wiring_of"]


@dataclass
class LayerWiring:
    """How the linears of a decoder layer are wired.

    Attributes:
        writers: names of the linears whose outputs are added to the hidden states, in the order of the additions; of
            two that are added at once, as in layers with attention beside the MLP, in the order of their calls. These
            sums lead from the layer's input to its output.
        groups: names of linears that are given the very same tensor, in the order of their calls.
    """

    writers: list[str] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)

    def group_of(self, name: str) -> list[str]:
        """The linears that share their input with one."""
        return next(group for group in self.groups if name in group)

    def written_before(self, name: str) -> list[str]:
        """Names of the linears whose outputs were added to the stream when that of ``name`` is."""
        return self.writers[: self.writers.index(name)]


def wiring_of(
    layer: nn.Module, linears: Mapping[str, nn.Module], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LayerWiring | None:
    """Watch a layer run once.

    Args:
        layer: its weights are loaded.
        linears: name to module, those of the layer.
        hidden: ``[rows, length, hidden]``, what it is given.
        args: its other arguments by place.
        kwargs: its other arguments by name.

    Returns:
        `None` where the hidden states do not go from input to output through sums of linears' outputs alone (norms
        after the linears, outputs that are scaled, mixtures of experts), a linear is not called exactly once on
        every position, or the layer overwrites what it is given.

    >>> class Layer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(2, 4), nn.Linear(4, 2)
    ...     def forward(self, hidden):
    ...         return hidden + self.down(self.up(hidden).relu())
    >>> layer = Layer()
    >>> wiring_of(layer, dict(layer.named_children()), torch.randn(1, 3, 2), (), {})
    LayerWiring(writers=['down'], groups=[['up'], ['down']])
    """
    names = {module: name for name, module in linears.items()}
    positions = hidden.shape[:-1].numel()
    wiring, given, calls = LayerWiring(), list[Tensor](), list[str]()
    stream = entered = hidden.clone()
    written = list[tuple[str, Tensor]]()
    regular = True

    def see(tensor: Tensor) -> None:
        """Whether a tensor that a module is given is the stream after one or two more additions."""
        nonlocal stream
        if tensor.shape != stream.shape or torch.equal(tensor, stream):
            return
        for added in (*combinations(written, 1), *combinations(written, 2)):
            if _is_sum(tensor, stream, [output for _, output in added]):
                wiring.writers += [name for name, _ in added]
                stream = tensor.clone()
                written.clear()
                return

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal regular
        if not inputs or not isinstance(inputs[0], Tensor):
            return
        see(inputs[0])
        name = names.get(module)
        if name is None:
            return
        regular = regular and name not in calls and inputs[0].shape[:-1].numel() == positions
        calls.append(name)
        for group, tensor in zip(wiring.groups, given, strict=True):
            if tensor is inputs[0]:
                group.append(name)
                return
        wiring.groups.append([name])
        given.append(inputs[0])

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape == stream.shape:
            written.append((names[module], output.clone()))  # some layers add to it in place

    with ExitStack() as stack, torch.no_grad():
        for module in layer.modules():
            if module is not layer:
                stack.callback(module.register_forward_pre_hook(before).remove)
        for module in names:
            stack.callback(module.register_forward_hook(after).remove)
        output = hidden_of(layer(hidden, *args, **kwargs), hidden)
    see(output)
    whole = torch.equal(output, stream) and bool(wiring.writers) and torch.equal(hidden, entered)
    return wiring if whole and regular and set(calls) == set(linears) else None


def _is_sum(tensor: Tensor, stream: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether a tensor is, bit for bit, the sum of the stream and one or two outputs in whatever order."""
    for terms in permutations([stream, *outputs]):
        # The first position first: most are told from it.
        if all(torch.equal(of(tensor), sum(map(of, terms[1:]), of(terms[0]))) for of in (_first, _all)):
            return True
    return False


def _first(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])[:1]


def _all(tensor: Tensor) -> Tensor:
    return tensor
