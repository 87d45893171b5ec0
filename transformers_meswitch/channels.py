"""The range of each input channel of a layer's delta: the paper's Figure 1, and what makes a channel salient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .compression.linear import reconstruct_linear
from .delta_format.reader import Delta
from .delta_format.spec import LinearRecord, tensor_key
from .errors import DeltaFormatError
from .inspection import Inspection, exact_deltas

__all__ = ["ChannelRanges", "channel_ranges", "default_layer"]


@dataclass(frozen=True)
class ChannelRanges:
    """The weights of a linear layer's delta, channel by channel.

    Attributes:
        module: canonical name of the layer.
        minimum: float32 ``[in]``, the smallest weight of each input channel, in the unit of the weights.
        maximum: float32 ``[in]``, the largest.
        salient: int64 ``[salient channels]``, the channels that the delta keeps in bfloat16.
        exact: whether the weights are expert − base; else they are what the delta stands for.
    """

    module: str
    minimum: Tensor
    maximum: Tensor
    salient: Tensor
    exact: bool


def default_layer(inspection: Inspection) -> str | None:
    """The linear layer in the middle of a delta, among those with salient channels if there are any; `None` if the
    delta changes no linear layer.
    """
    linears = [row for row in inspection.modules if row.kind == "linear"]
    rows = [row for row in linears if row.salient_channels] or linears
    return rows[len(rows) // 2].module if rows else None


def channel_ranges(delta: Delta, module: str, base: str | None = None, expert: str | None = None) -> ChannelRanges:
    """The range of each input channel of one layer, with one layer in memory.

    Args:
        delta: the opened delta.
        module: canonical name of a linear layer.
        base: folder or Hub id of the base.
        expert: folder or Hub id of the fine-tune. With both, the ranges are those of expert − base; else of the
            delta's own reconstruction, whose codes have fewer and narrower levels.

    Raises:
        BaseMismatchError: the delta was formed against another base.
        CheckpointError: base or expert cannot be read.
        DeltaFormatError: the delta has no such linear layer, or base and expert do not fit it.
    """
    record = delta.records.get(module)
    if not isinstance(record, LinearRecord):
        raise DeltaFormatError(
            f"{module!r} is no linear layer that the delta changes; `meswitch inspect` lists those that are."
        )
    leaves = {leaf: delta.tensor(tensor_key(module, leaf)) for leaf in record.leaves()}
    exact = base is not None and expert is not None
    if base is not None and expert is not None:
        weights = next(weight for _, weight in exact_deltas(delta, [module], base, expert))
    else:
        weights = reconstruct_linear(record, leaves)
    salient = leaves.get("salient_index", torch.zeros(0)).to(torch.int64)
    return ChannelRanges(module, weights.amin(dim=0), weights.amax(dim=0), salient, exact)
