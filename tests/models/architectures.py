"""Tiny random models of every supported architecture, and fine-tunes of them that change every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: ``model_type`` to what its config needs beside the common sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "phi3": {},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"num_key_value_heads": None},
}


def build(model_type: str, tied: bool, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random two-layer model in float32."""
    torch.manual_seed(seed)
    settings = {**_COMMON, **ARCHITECTURES.get(model_type, {}), **sizes, "tie_word_embeddings": tied}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()


def fine_tune(folder: Path, seed: int, tied: bool | None = None) -> PreTrainedModel:
    """The model in ``folder`` with noise on every parameter, biases included; tied or untied anew if asked."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if tied is not None:
        head, shared = model.get_output_embeddings(), model.get_input_embeddings().weight
        head.weight = shared if tied else torch.nn.Parameter(shared.detach().clone())
        model.config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.2))
    return model
