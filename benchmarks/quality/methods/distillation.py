"""Train step sizes, and nothing else, until the compressed model's logits are the expert's.

BitDelta (arXiv 2402.10193, section 3.1) minimises the mean square difference of the logits with Adam over a few
hundred steps; ME-Switch distils its step sizes in the same way.
"""

from __future__ import annotations

import dataclasses
import math
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..family_example import collate
from .base import Inputs
from .stepped import Stepped

__all__ = ["distil"]

_BATCH = 32
_RATE = 1e-2


class _Weight(torch.autograd.Function):
    """``fixed + levels * step / 2`` in bfloat16, which keeps only the int8 levels for its gradient."""

    @staticmethod
    def forward(ctx: Any, fixed: Tensor, levels: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(levels)
        ctx.scalar = step.numel() == 1
        return torch.addcmul(fixed, levels.float(), (step / 2)[:, None]).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, None]:
        (levels,) = ctx.saved_tensors
        step = (gradients[0].float() * levels).sum(dim=1) / 2
        return None, None, step.sum().reshape(1) if ctx.scalar else step, None


def distil(
    inputs: Inputs, layers: dict[str, Stepped], *, steps: int, batch_size: int = _BATCH, rate: float = _RATE
) -> dict[str, Stepped]:
    """The same layers with trained steps.

    What is trained is a factor on each step, so that one learning rate fits layers of all scales; Adam, cosine to
    zero. The logits are compared where the expert answers in ``inputs.sequences``.

    Args:
        inputs: the expert, and the sequences to train on.
        layers: linear's name to what is rounded.
        steps: optimiser steps.
        batch_size: sequences a step.
        rate: learning rate of the factors.
    """
    model, device = inputs.model, next(iter(inputs.expert.values())).device
    factors = {name: nn.Parameter(torch.zeros_like(layer.step)) for name, layer in layers.items()}
    fixed = {
        name: inputs.base[f"{name}.weight"].float() + (0 if layer.kept is None else layer.kept)
        for name, layer in layers.items()
    }
    optimizer = torch.optim.Adam(factors.values(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    frozen = {key: value.detach() for key, value in inputs.expert.items()}
    head = frozen.get("lm_head.weight", frozen["model.embed_tokens.weight"])
    dtype = head.dtype
    rng = Random(inputs.seed)

    def hidden(weights: dict[str, Tensor], tokens: Tensor, at: Tensor) -> Tensor:
        inner = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
        output = functional_call(model.base_model, inner, kwargs={"input_ids": tokens, "use_cache": False})
        return output.last_hidden_state.flatten(0, 1)[at]

    for _ in range(steps):
        rows = [inputs.sequences[rng.randrange(len(inputs.sequences))] for _ in range(batch_size)]
        tokens, learnt = collate(rows, pad=0)
        at = learnt.flatten().nonzero().squeeze(1).to(device)
        tokens = tokens.to(device)
        with torch.no_grad():
            wanted = F.linear(hidden(frozen, tokens, at), head)
        student = dict(frozen)
        for name, layer in layers.items():
            step = layer.step * (1 + factors[name])
            student[f"{name}.weight"] = _Weight.apply(fixed[name], layer.levels, step, dtype)
        logits = F.linear(hidden(student, tokens, at), head)
        loss = (logits.float() - wanted.float()).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return {
        name: dataclasses.replace(layer, step=(layer.step * (1 + factors[name])).detach())
        for name, layer in layers.items()
    }
