"""A causal LM in two: what gives the last hidden states, and what makes logits of them.

The expert's hidden states are kept on disk and its logits are not: they are as many times wider as the vocabulary is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..errors import UnsupportedModelError

__all__ = ["OutputHead", "check_split", "checkpoint_layers", "hidden_states"]


class _Given(nn.Module):
    """In the place of a model's layers: what goes in as embeddings is what comes out."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


class OutputHead:
    """From last hidden states to logits as a model works them out: its head, and any scale or soft cap on it.

    Args:
        model: a causal LM; its parameters are shared, and of them only those outside the layers are held.
    """

    def __init__(self, model: Any) -> None:
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, model.base_model_prefix: _Given()}

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[n, width]`` to ``[n, vocabulary]``."""
        return self._model(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits.squeeze(0)

    def to(self, device: torch.device) -> OutputHead:
        """This, with its parameters on a device; they are moved in place."""
        self._model.to(device)
        return self


def hidden_states(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """The last hidden states of a causal LM where they are asked for.

    Args:
        model: the model.
        ids: int64 ``[rows, length]``, padded on the right: real positions of a causal model do not see the padding.
        positions: bool ``[rows, length]``.

    Returns:
        ``[n, width]``, row after row, on the model's device.
    """
    device = model.device
    output = getattr(model, model.base_model_prefix)(input_ids=ids.to(device), use_cache=False)
    at = positions.flatten().nonzero().squeeze(1).to(device)
    return output.last_hidden_state.flatten(0, 1)[at]


@torch.no_grad()
def check_split(model: Any, ids: Tensor) -> None:
    """Make sure that the two halves of a model are the whole.

    Args:
        model: the model.
        ids: int64 ``[1, length]``, any text.

    Raises:
        UnsupportedModelError: the model makes its logits of more than its last hidden states.
    """
    whole = model(input_ids=ids.to(model.device), use_cache=False).logits[0].float()
    try:
        halves = OutputHead(model)(hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool))).float()
        # The rows of a matrix product may be summed in another order, so a rounding of the largest logit is allowed.
        allowed = 1e-2 * whole[whole.isfinite()].abs().max()
        same = halves.shape == whole.shape and bool(((halves - whole).abs() <= allowed)[whole.isfinite()].all())
    except (AttributeError, TypeError, KeyError) as error:
        raise _unsupported(model) from error
    if not same:
        raise _unsupported(model)


def _unsupported(model: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} makes its logits of more than its last hidden states, so its deltas cannot be "
        "distilled. They can be used as they are."
    )


def checkpoint_layers(model: nn.Module) -> None:
    """Have each decoder layer run again for its gradients, so that of its activations only the input is kept.

    transformers' own switch works in training mode only, in which some models drop activations at random.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _checkpointed(layer.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
