"""How far apart the predictions of two models are, token by token: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Fidelity", "perplexity"]

#: Positions worked on at once, which bounds the float32 copies of their logits.
_CHUNK = 128


def perplexity(negative_log_likelihood: float, tokens: int) -> float:
    """``exp`` of the mean negative log-likelihood a token in nats; infinite where a float cannot hold it.

    >>> round(perplexity(10 * math.log(8), 10), 6)
    8.0
    """
    mean = negative_log_likelihood / tokens
    return math.inf if mean > math.log(torch.finfo(torch.float64).max) else math.exp(mean)


@dataclass
class Fidelity:
    """Sums over tokens of a comparison of a model with a reference (the expert); add pieces of text one by one.

    Attributes:
        tokens: predicted tokens so far.
        kl: sum of KL(reference ‖ model), nats.
        agreements: tokens at which both find the same next token most probable.
        reference_nll: sum of the reference's negative log-likelihood of the true next tokens, nats.
        model_nll: the same of the model.
    """

    tokens: int = 0
    kl: float = 0.0
    agreements: int = 0
    reference_nll: float = 0.0
    model_nll: float = 0.0

    def add(self, reference: Tensor, model: Tensor, targets: Tensor) -> None:
        """Compare the predictions at further positions.

        Args:
            reference: logits of the reference ``[positions, vocabulary]``, any floating dtype and device.
            model: logits of the model over the same vocabulary, in the same shape and on the same device.
            targets: int64 ``[positions]``, the tokens that really come next.

        The softmax is taken in float32, over the vocabulary given; sums over positions are kept in float64.
        """
        for start in range(0, len(targets), _CHUNK):
            part = slice(start, start + _CHUNK)
            of_reference = reference[part].float().log_softmax(dim=-1)
            of_model = model[part].float().log_softmax(dim=-1)
            probability = of_reference.exp()
            # A token that the reference excludes (logit of minus infinity) contributes 0, whatever the model says.
            terms = torch.where(probability > 0, probability * (of_reference - of_model), 0.0)
            place = targets[part, None].to(reference.device)
            self.kl += _total(terms.sum(dim=-1))
            self.agreements += int((of_reference.argmax(dim=-1) == of_model.argmax(dim=-1)).sum())
            self.reference_nll -= _total(of_reference.gather(1, place))
            self.model_nll -= _total(of_model.gather(1, place))
        self.tokens += len(targets)

    @property
    def mean_kl(self) -> float:
        """KL(reference ‖ model) a token, nats. It cannot be negative; rounding that makes it so is cut off."""
        mean = self.kl / self.tokens
        return mean if math.isnan(mean) else max(0.0, mean)

    @property
    def agreement(self) -> float:
        """Share of the tokens at which the most probable next token is the same, 0 to 1."""
        return self.agreements / self.tokens


def _total(values: Tensor) -> float:
    """Sum in float64 on the CPU: some accelerators have no float64."""
    return float(values.cpu().double().sum())
