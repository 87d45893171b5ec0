"""What methods learn of an expert's inputs: the second moments of every linear's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .family_example import collate
from .methods.base import linear_names

__all__ = ["collect_moments"]


@torch.inference_mode()
def collect_moments(
    model: PreTrainedModel, sequences: Sequence[tuple[list[int], int]], batch_size: int = 64
) -> dict[str, Tensor]:
    """``E[x xᵀ]`` of the inputs of every linear over all tokens of the sequences, in one pass.

    Args:
        model: the expert, in evaluation mode.
        sequences: token ids, and how many of them are the prompt's (which plays no part here).
        batch_size: sequences at once.

    Returns:
        Linear's name to float32 ``[in, in]`` on the model's device.
    """
    sums: dict[str, Tensor] = {}
    real: Tensor | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs = arguments[0].flatten(0, 1)[real].float()
            product = inputs.T @ inputs
            sums[name] = sums[name].add_(product) if name in sums else product

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in linear_names(model)]
    tokens_seen = 0
    ordered = sorted(sequences, key=lambda sequence: len(sequence[0]))
    try:
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size]
            tokens, _ = collate(rows, pad=0)
            lengths = torch.tensor([len(ids) for ids, _ in rows])
            real = (torch.arange(tokens.shape[1]) < lengths[:, None]).flatten().nonzero().squeeze(1).to(model.device)
            model.base_model(input_ids=tokens.to(model.device), use_cache=False)
            tokens_seen += len(real)
    finally:
        for handle in handles:
            handle.remove()
    # Clones, since a method that trains may not meet tensors of inference mode.
    with torch.inference_mode(False):
        return {name: total.clone() / tokens_seen for name, total in sums.items()}
