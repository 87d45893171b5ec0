"""What a causal LM makes of a multiple-choice question: the options' letters, and those that it prefers anyway."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .question import Question

__all__ = ["letter_logs", "letter_prior"]

#: Queries that say nothing, as of Zhao et al.
_CONTENT_FREE = ("N/A", "[MASK]", "")
#: Questions of a model whose prior is kept; experts that come and go ask others.
_MOST_KEPT = 16
#: Model to the state it was in, and its priors in that by question. Outside of routers, which are copied and pickled.
_PRIORS: WeakKeyDictionary[Any, tuple[Any, dict[Question, Tensor]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@torch.no_grad()
def letter_logs(model: Any, question: Question, query: Sequence[int]) -> Tensor:
    """Log-probabilities of the options' letters after a question, float64 ``[options]`` on the CPU.

    Rows go through alone, so that no padding can move an answer.

    Args:
        model: a causal LM.
        question: in its tokens.
        query: token ids.
    """
    ids = torch.tensor([question.ids(query)], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits[list(question.letters)].double().log_softmax(dim=0).cpu()


def letter_prior(model: Any, tokenizer: Any, question: Question) -> Tensor:
    """What a model answers to queries that say nothing, to be divided out: its liking for letters and their places.

    Zhao et al., "Calibrate before use", arXiv 2102.09690, section 4: the mean over three such queries. They are asked
    once a model and question, and again when the model's weights are others than they were.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        question: in its tokens.

    Returns:
        Log-probabilities, float64 ``[options]`` on the CPU.
    """
    state = _state(model)
    with _LOCK:
        kept, priors = _PRIORS.get(model, (None, {}))
        if kept == state and question in priors:
            return priors[question]
    empty = tokenizer(list(_CONTENT_FREE), add_special_tokens=False)["input_ids"]
    prior = torch.stack([letter_logs(model, question, row).exp() for row in empty]).mean(dim=0).log()
    with _LOCK:
        kept, priors = _PRIORS.get(model, (None, {}))
        priors = dict(priors) if kept == state else {}
        priors[question] = prior
        for oldest in list(priors)[:-_MOST_KEPT]:
            del priors[oldest]
        _PRIORS[model] = state, priors
    return prior


def _state(model: Any) -> tuple[Any, ...]:
    """Changes whenever weights are replaced, moved, cast or written to, and with dropout on or off."""
    weights = (
        # Tensors made in inference mode count no versions.
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype)
        for p in model.parameters()
    )
    return model.training, model.dtype, tuple(weights)
