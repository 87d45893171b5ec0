"""The head on a base, fitted and asked as ``HeadRouter`` does, for domains that no expert is loaded for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transformers_meswitch import HeadRouter, RouterOutput
from transformers_meswitch.routing.head_fit import fit_head
from transformers_meswitch.routing.hidden_states import early_layers, pooled_hidden_states
from transformers_meswitch.routing.window import window_ids

__all__ = ["WINDOW", "ask", "fit", "read"]

WINDOW = 256
#: Texts that are read between two writes of the cache.
_AT_ONCE = 1000

Prompts = Mapping[str, Sequence[str]]


def read(model: Any, prompts: Prompts, cache: Path | None = None) -> dict[str, Any]:
    """Features of each domain's prompts at all early layers.

    Args:
        model: whose base is read.
        prompts: by domain.
        cache: a file with features of texts that this base has read, which is added to; a small machine reads for
            a quarter of an hour.
    """
    layers, tokenizer = early_layers(model), model.tokenizer_for(None)
    known: dict[str, Any] = torch.load(cache) if cache is not None and cache.exists() else {}
    missing = list(dict.fromkeys(text for own in prompts.values() for text in own if text not in known))
    with model._meswitch_switch.rows([None]):
        for start in range(0, len(missing), _AT_ONCE):
            texts = missing[start : start + _AT_ONCE]
            known |= zip(texts, pooled_hidden_states(model, window_ids(tokenizer, texts, WINDOW), layers), strict=True)
            if cache is not None:
                torch.save(known, cache)
    return {label: torch.stack([known[text] for text in own]) for label, own in prompts.items()}


def fit(model: Any, features: Mapping[str, Any]) -> HeadRouter:
    """A router of some of the features."""
    found = fit_head(features, early_layers(model))
    return HeadRouter(
        found.statistics,
        model.config.hidden_size,
        found.layer,
        WINDOW,
        found.shrinkage,
        found.temperature,
        found.threshold,
        found.distance_limit,
    )


def ask(router: HeadRouter, model: Any, prompts: Sequence[str]) -> RouterOutput:
    """What the router says of prompts."""
    return router.route_ids(model, window_ids(model.tokenizer_for(None), prompts, router.window), router.labels)
