"""Evidence to test with, of no real delta."""

from __future__ import annotations

from typing import Any

from transformers_meswitch import Evidence
from transformers_meswitch.verification.evidence import TextEvidence, WeightEvidence


def evidence(
    *,
    text: bool = True,
    errors: tuple[float, ...] = (0.25, 0.5),
    bits: int = 2,
    tensors_sha256: str = "0" * 64,
    **of_text: Any,
) -> Evidence:
    """A faithful delta; ``of_text`` overrides fields of :class:`TextEvidence`."""
    figures: dict[str, Any] = {
        "tokens": 4000,
        "shared_tokens": 3900,
        "vocab_size": 132,
        "shared_vocab_size": 128,
        "kl": 0.004,
        "kl_base": 0.5,
        "top1_agreement": 0.98,
        "top1_agreement_base": 0.6,
        "perplexity_base": 12.5,
        "perplexity_expert": 4.25,
        "perplexity_delta": 4.375,
        "tokens_sha256": "1" * 64,
        "dtype": "float32",
        "device": "cpu",
    }
    return Evidence(
        tensors_sha256=tensors_sha256,
        base="me/base",
        base_revision=None,
        expert=None,
        expert_revision=None,
        date="2026-01-31",
        versions={"transformers-meswitch": "0.1.0"},
        weights=WeightEvidence({f"layers.{i}": error for i, error in enumerate(errors)}, {str(bits): 1000}),
        text=TextEvidence(**{**figures, **of_text}) if text else None,
    )
