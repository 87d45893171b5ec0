"""What is measured of a model: which items it gets right, and how far its predictions are from the expert's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .family_example import collate

__all__ = ["Divergence", "difference_interval", "divergence", "from_bits", "reference_states", "to_bits"]

#: Positions whose logits are compared at once: three float32 tensors of 49,152 columns.
_CHUNK = 2048


def to_bits(right: Sequence[bool]) -> str:
    """One bit an item, the first item the highest bit of the first hexadecimal digit; filled up with zeros.

    >>> to_bits([True, False, False, False, True])
    '88'
    """
    padded = [*right, *[False] * (-len(right) % 4)]
    digits = (padded[i : i + 4] for i in range(0, len(padded), 4))
    return "".join(f"{sum(bit << 3 - k for k, bit in enumerate(digit)):x}" for digit in digits)


def from_bits(text: str, count: int) -> list[bool]:
    """What :func:`to_bits` wrote.

    >>> from_bits("88", 5)
    [True, False, False, False, True]
    """
    return [bool(int(text[i // 4], 16) >> (3 - i % 4) & 1) for i in range(count)]


def difference_interval(expert: Sequence[bool], method: Sequence[bool]) -> tuple[float, float]:
    """Mean of expert − method over items that both answered, and the half-width of its 95 % interval.

    The interval is that of a mean of paired differences, each −1, 0 or 1, by the normal approximation.

    >>> difference_interval([True] * 4, [True, True, True, False])
    (0.25, 0.49)
    """
    differences = [int(ours) - int(theirs) for ours, theirs in zip(expert, method, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((value - mean) ** 2 for value in differences) / max(1, count - 1)
    return round(mean, 6), round(1.96 * math.sqrt(variance / count), 6)


@torch.inference_mode()
def reference_states(
    model: PreTrainedModel, sequences: Sequence[tuple[list[int], int]], batch_size: int = 128
) -> Tensor:
    """Last hidden states where the reference answers are predicted: ``[positions, hidden]``.

    Args:
        model: in evaluation mode.
        sequences: token ids, and how many of them are the prompt's.
        batch_size: sequences at once.
    """
    found = []
    ordered = sorted(sequences, key=lambda sequence: len(sequence[0]))
    for start in range(0, len(ordered), batch_size):
        tokens, learnt = collate(ordered[start : start + batch_size], pad=0)
        at = learnt.flatten().nonzero().squeeze(1).to(model.device)
        hidden = model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
        found.append(hidden.flatten(0, 1)[at])
    return torch.cat(found)


@dataclass(frozen=True)
class Divergence:
    """From the expert to a model, over the positions of the held-out reference answers.

    Attributes:
        kl: mean KL(expert ‖ model) of the next token, in nats.
        top1: share of positions at which both predict the same token.
        positions: how many there are.
    """

    kl: float
    top1: float
    positions: int


@torch.inference_mode()
def divergence(expert: Tensor, expert_head: Tensor, model: Tensor, model_head: Tensor) -> Divergence:
    """Compare two models' predictions.

    Args:
        expert: the expert's last hidden states, ``[positions, hidden]``.
        expert_head: its output head, ``[vocabulary, hidden]``.
        model: the other's.
        model_head: the other's.
    """
    kl, same = 0.0, 0
    for ours, theirs in zip(expert.split(_CHUNK), model.split(_CHUNK), strict=True):
        p = F.linear(ours, expert_head).float().log_softmax(dim=-1)
        q = F.linear(theirs, model_head).float().log_softmax(dim=-1)
        kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    return Divergence(kl / len(expert), same / len(expert), len(expert))
