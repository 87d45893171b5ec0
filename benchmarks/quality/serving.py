"""A model whose linears add a delta's output to the base's, as the package's layers do, both exchanged in place.

Merging rounds ``base + delta`` to bfloat16 once more, and the rounding of a small delta on a large weight is an error
of its own, which is not the compression's; see ``docs/quality.md``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .methods.base import linear_names

__all__ = ["LEVELS", "prepare_serving", "put_weights", "rounded_activations"]

#: Levels on either side of zero that the kernels' numerics round activations to.
LEVELS = {"int8": 127, "int16": 127 * 256}
#: Input channels with a scale of their own.
_TILE = 1024


class _Served(nn.Linear):
    """``x Wᵀ + x Δ̂ᵀ``, each rounded to the dtype of ``x``: what :func:`transformers_meswitch.ops.delta_linear` adds.

    Attributes:
        delta: dense delta ``[out, in]``, in the dtype of the weight.
        whole: ``W + Δ̂``, rounded once to that dtype, ``[out, in]``; what more than one position is multiplied by, as
            :func:`meswitch_kernels.prefill_linear` does, or `None`.
        levels: what the delta is multiplied by is rounded to so many on either side of zero; not, if `None`.
    """

    delta: Tensor
    whole: Tensor | None
    levels: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.whole is not None and input.shape[-2] > 1:
            return F.linear(input, self.whole, self.bias)
        rounded = input if self.levels is None else rounded_activations(input, self.levels)
        return F.linear(input, self.weight, self.bias) + F.linear(rounded, self.delta)


def rounded_activations(x: Tensor, levels: int, salient: Tensor | None = None) -> Tensor:
    """Activations ``[..., in]`` rounded as by the decode kernels for a delta, by the largest of each 1,024 channels.

    Not to the bit: the kernels count channels without the salient ones, scale by column steps before, and take other
    tiles where others are tuned.

    Args:
        x: the activations.
        levels: on either side of zero.
        salient: channels that are left as they are; none if `None`.

    >>> rounded_activations(torch.tensor([[1.0, -0.4, 0.1]]), 2)
    tensor([[ 1.0000, -0.5000,  0.0000]])
    >>> rounded_activations(torch.tensor([[9.9, 1.0, -0.4]]), 2, torch.tensor([0]))
    tensor([[ 9.9000,  1.0000, -0.5000]])
    """
    width = x.shape[-1]
    coded = x.float() if salient is None else x.float().index_fill(-1, salient, 0.0)
    tiles = F.pad(coded, (0, -width % _TILE)).unflatten(-1, (-1, _TILE))
    unit = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
    rounded = ((tiles / unit).round() * unit).flatten(-2)[..., :width].to(x.dtype)
    return rounded if salient is None else rounded.index_copy(-1, salient, x[..., salient])


def prepare_serving(model: PreTrainedModel) -> None:
    """Give every linear but the output head a delta of zeros, in place."""
    for name in linear_names(model):
        module = model.get_submodule(name)
        module.__class__ = _Served
        module.register_buffer("delta", torch.zeros_like(module.weight), persistent=False)
        module.register_buffer("whole", None, persistent=False)


@torch.no_grad()
def put_weights(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    *,
    merged_prompts: bool = False,
    levels: int | None = None,
) -> None:
    """Write parameters and deltas into a prepared model.

    Args:
        model: prepared by :func:`prepare_serving`.
        weights: every parameter by its full name.
        deltas: linear's name to its dense delta, any floating dtype; those that are left out are zero.
        merged_prompts: whether prompts are multiplied by ``W + Δ̂``, and only what follows by both apart.
        levels: of :func:`rounded_activations`; `None` rounds none.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    for name, buffer in model.named_buffers():
        if name.endswith(".delta"):
            known = deltas.get(name.removesuffix(".delta"))
            buffer.zero_() if known is None else buffer.copy_(known)
    for name, module in model.named_modules():
        if isinstance(module, _Served):
            known = deltas.get(name)
            weight = module.weight.detach()
            whole = weight if known is None else weight.float() + known.float()
            module.whole = whole.to(weight.dtype) if merged_prompts else None
            module.levels = levels
