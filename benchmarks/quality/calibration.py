"""What methods learn of an expert's inputs: the second moments of every linear's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_meswitch.compression.moments import MomentCollector

from .family_example import collate
from .methods.base import linear_names

__all__ = ["collect_moments"]


@torch.no_grad()
def collect_moments(
    model: PreTrainedModel, sequences: Sequence[tuple[list[int], int]], batch_size: int = 64
) -> dict[str, Tensor]:
    """``E[x xᵀ]`` of the inputs of every linear over the sequences, in one pass, as the package takes it.

    Args:
        model: the expert, in evaluation mode.
        sequences: token ids, and how many of them are the prompt's (which plays no part here).
        batch_size: sequences at once.

    Returns:
        Linear's name to float32 ``[in, in]`` on the model's device.
    """
    collector = MomentCollector({name: model.get_submodule(name) for name in linear_names(model)})
    ordered = sorted(sequences, key=lambda sequence: len(sequence[0]))
    for start in range(0, len(ordered), batch_size):
        rows = ordered[start : start + batch_size]
        tokens, _ = collate(rows, pad=0)
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        with collector.collecting(torch.arange(tokens.shape[1]) < lengths[:, None]):
            model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    return collector.means()
