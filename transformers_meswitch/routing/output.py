"""What a router says of some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

__all__ = ["BASE_LABEL", "RouterOutput", "joined", "picked"]

#: The label of prompts that the base answers itself.
BASE_LABEL = "base"


@dataclass
class RouterOutput(ModelOutput):
    """The expert that a router picked for each prompt, and how sure it was.

    Args:
        experts (`list[str | None]`): the expert of each prompt; `None` is the base. Where the router abstained, it is
            the router's default.
        probabilities (`torch.FloatTensor` of shape `(prompts, labels)`): on the CPU, rows sum to 1.
        labels (`list[str]`): what the columns stand for, the experts that the router chose among; ``"base"`` is the
            base.
        abstained (`torch.BoolTensor` of shape `(prompts,)`): whether no expert was likely enough.

    >>> output = RouterOutput(["math"], torch.tensor([[0.9, 0.1]]), ["math", "code"], torch.tensor([False]))
    >>> output.experts, output.confidence
    (['math'], [0.9])
    """

    # As in transformers, what has no default needs one all the same.
    experts: list[str | None] = None  # type: ignore[assignment]
    probabilities: torch.Tensor = None  # type: ignore[assignment]
    labels: list[str] = None  # type: ignore[assignment]
    abstained: torch.Tensor = None  # type: ignore[assignment]

    @property
    def confidence(self) -> list[float]:
        """The probability of each prompt's likeliest label; an abstention is one that is too low."""
        return [round(p, 6) for p in self.probabilities.amax(dim=1).tolist()]


def joined(parts: Sequence[RouterOutput]) -> RouterOutput:
    """What was said of some prompts after others, one part at least, all by the same router.

    >>> one = RouterOutput(["math"], torch.tensor([[0.9, 0.1]]), ["math", "code"], torch.tensor([False]))
    >>> joined([one, one]).experts
    ['math', 'math']
    """
    return RouterOutput(
        [expert for part in parts for expert in part.experts],
        torch.cat([part.probabilities for part in parts]),
        parts[0].labels,
        torch.cat([part.abstained for part in parts]),
    )


def picked(
    probabilities: torch.Tensor, labels: Sequence[str], abstained: torch.Tensor, default: str | None
) -> RouterOutput:
    """The likeliest expert of each prompt, or the default where the router abstains.

    Args:
        probabilities: float ``[prompts, labels]``.
        labels: what the columns stand for.
        abstained: bool ``[prompts]``.
        default: the expert that answers then; `None` is the base.
    """
    best = [None if labels[i] == BASE_LABEL else labels[i] for i in probabilities.argmax(dim=1).tolist()]
    chosen = [default if out else name for out, name in zip(abstained.tolist(), best, strict=True)]
    return RouterOutput(chosen, probabilities, list(labels), abstained)
