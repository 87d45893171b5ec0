"""The head on a base, fitted and asked as ``HeadRouter`` does, for domains that no expert is loaded for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers_meswitch import HeadRouter, RouterOutput
from transformers_meswitch.routing.head_fit import fit_head
from transformers_meswitch.routing.hidden_states import early_layers, pooled_hidden_states
from transformers_meswitch.routing.window import window_ids

__all__ = ["WINDOW", "ask", "fit", "read"]

WINDOW = 256

Prompts = Mapping[str, Sequence[str]]


def read(model: Any, prompts: Prompts) -> dict[str, Any]:
    """Features of each domain's prompts at all early layers."""
    layers, tokenizer = early_layers(model), model.tokenizer_for(None)
    found = {}
    with model._meswitch_switch.rows([None]):
        for label, own in prompts.items():
            found[label] = pooled_hidden_states(model, window_ids(tokenizer, own, WINDOW), layers)
    return found


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
