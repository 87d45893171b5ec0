"""Pooled hidden states of the base at early layers, without running the layers above them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..compression.layered_model import decoder_layers
from ..errors import UnsupportedModelError

__all__ = ["check_layers", "early_layers", "find_layers", "pool", "pooled_hidden_states", "stopped_before"]

#: Rows that go through the model at once.
_ROWS = 16
#: Hidden states pooled so far in this thread; a hook leaves the calls of other threads alone.
_POOLING: ContextVar[_Pooling | None] = ContextVar("meswitch_pooling", default=None)
#: Name of the decoder layers of each model that was read before. Not the layers themselves: a module may refer back to
#: its model, which would then never be freed.
_LAYERS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _Stop(Exception):
    """Leaves the forward pass below the layers that are not needed."""


class _Pooling:
    def __init__(self, mask: Tensor, layers: Sequence[int]) -> None:
        self.mask, self.layers = mask, tuple(layers)
        self.pooled: dict[int, Tensor] = {}

    def take(self, layer: int, hidden: Tensor) -> None:
        """Keep what goes into ``layers[layer]``, and stop below the last layer that is asked for."""
        self.pooled[layer] = masked_mean(hidden, self.mask)
        if layer == max(self.layers):
            raise _Stop


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each row, every token scaled to a root mean square of 1.

    The scaling is what the model's own norms do. Without it the first token, whose hidden state is hundreds of times
    larger in many models (Xiao et al., "Efficient streaming language models with attention sinks", arXiv 2309.17453),
    would be all that the mean shows.

    Args:
        hidden: ``[rows, length, width]``, any floating dtype.
        mask: bool ``[rows, length]``, at least one real token a row.

    Returns:
        float32 ``[rows, width]``.

    >>> masked_mean(torch.tensor([[[3.0, 3.0], [1.0, -1.0], [9.0, 0.0]]]), torch.tensor([[True, True, False]]))
    tensor([[1., 0.]])
    """
    hidden = hidden.float()
    size = hidden.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    weight = mask.to(hidden.device).unsqueeze(-1)
    return torch.where(weight, hidden / size, 0.0).sum(dim=1) / weight.sum(dim=1)


def find_layers(model: Any) -> nn.ModuleList:
    """The decoder layers, searched for once a model: with experts a search goes through thousands of modules."""
    if (name := _LAYERS.get(model)) is not None:
        with suppress(AttributeError):  # the model was taken apart since
            layers: nn.ModuleList = model.get_submodule(name)
            return layers
    found = decoder_layers(model)
    if found is None:
        raise UnsupportedModelError(
            f"The decoder layers of {type(model).__name__} cannot be told apart from the rest, so a router cannot "
            "read hidden states between them. Use a MultipleChoiceRouter, or name the expert."
        )
    _LAYERS[model] = found[0]
    return found[1]


def early_layers(model: Any) -> list[int]:
    """Layers that a router may be fitted to: those of the first quarter, and at least two where there are more.

    ``layer`` counts as in transformers' ``hidden_states``: 0 is the embedding, ``i`` what comes out of ``i`` layers.

    Raises:
        UnsupportedModelError: the model's layers cannot be told apart from the rest.
    """
    count = len(find_layers(model))
    return list(range(1, max(min(3, count), count // 4 + 1))) or [0]


def check_layers(model: Any, layers: Sequence[int]) -> None:
    """Refuse layers that the model has not.

    Raises:
        UnsupportedModelError: names the layer and how many there are.
    """
    count = len(find_layers(model))
    wrong = next((layer for layer in layers if not 0 <= layer < count), None)
    if wrong is not None:
        raise UnsupportedModelError(
            f"Hidden states of layer {wrong} were asked for, but {type(model).__name__} has {count} layers, of which "
            f"a router may read 0 (the embedding) to {count - 1}."
        )


@torch.no_grad()
def pooled_hidden_states(model: Any, rows: Sequence[Sequence[int]], layers: Sequence[int]) -> Tensor:
    """Mean hidden state of each row of tokens after some of the first layers.

    Layers above the highest one asked for are not run. What answers is whatever is active in the model: for the
    base of a model with experts, call it inside ``switch.rows([None])``.

    Args:
        model: a causal LM or its decoder. Its mode is left alone, as other threads may use it: a model in training
            mode is read with its dropout on, so call ``model.eval()`` before routing.
        rows: token ids of each row, without padding, at least one a row.
        layers: as in :func:`early_layers`.

    Returns:
        float32 ``[rows, layers, width]`` on the CPU: see :func:`masked_mean`.

    Raises:
        UnsupportedModelError: there is no such layer.
    """
    check_layers(model, layers)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pooled: dict[int, Tensor] = {}
    with stopped_before(model, layers) as decoder:
        for start in range(0, len(rows), _ROWS):
            numbers = order[start : start + _ROWS]
            for i, states in zip(
                numbers, _pool_batch(decoder, model.device, [rows[i] for i in numbers], layers), strict=True
            ):
                pooled[i] = states
    return torch.stack([pooled[i] for i in range(len(rows))])


@contextmanager
def stopped_before(model: Any, layers: Sequence[int]) -> Iterator[nn.Module]:
    """The decoder of a model, which :func:`pool` may run inside the block.

    Args:
        model: a causal LM or its decoder.
        layers: whose inputs are asked for; the last of them is not run.
    """
    modules = find_layers(model)
    with ExitStack() as hooks:
        for layer in set(layers):
            handle = modules[layer].register_forward_pre_hook(_hook(layer), with_kwargs=True, prepend=True)
            hooks.callback(handle.remove)
        yield getattr(model, model.base_model_prefix, model)


def _hook(layer: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pooling = _POOLING.get()
        if pooling is not None:
            pooling.take(layer, args[0] if args else kwargs["hidden_states"])

    return hook


def _pool_batch(decoder: Any, device: torch.device, rows: list[Sequence[int]], layers: Sequence[int]) -> Tensor:
    """Of rows that go through together, padded on the right, where real tokens of a causal model never look."""
    shortest, length = min(map(len, rows)), max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    # Moved before the layers are queued: a copy to a GPU after them would wait for them.
    return pool(decoder, ids.to(device), mask.to(device), layers, padded=shortest < length).cpu()


def pool(decoder: Any, ids: Tensor, mask: Tensor, layers: Sequence[int], *, padded: bool) -> Tensor:
    """Pooled hidden states of one batch, left on the device.

    Args:
        decoder: of :func:`stopped_before`, for the same layers.
        ids: int64 ``[rows, length]``, on the model's device.
        mask: bool ``[rows, length]``, false at padding.
        layers: as there.
        padded: whether there is padding.

    Returns:
        float32 ``[rows, layers, width]`` on the device.
    """
    pooling = _Pooling(mask, layers)
    token = _POOLING.set(pooling)
    try:
        # Without padding there is nothing to mask, and without a mask attention takes its fastest way.
        decoder(input_ids=ids, attention_mask=mask.to(torch.int64) if padded else None, use_cache=False)
    except _Stop:
        pass
    finally:
        _POOLING.reset(token)
    return torch.stack([pooling.pooled[layer] for layer in layers], dim=1)
