"""What a delta must compute, found without the package: a stock model with dense weights, all else the expert's.

Quantised rows count as dense weights too.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.fixtures_models import change_rows, dense_delta


def reference_model(base: Path, expert: Path, delta: Path) -> PreTrainedModel:
    """The expert's stock model, each linear's weight and each quantised row replaced by the base's plus the delta's.

    Every linear but the output head must be in the delta, so that none is compared with the expert's own weight.
    """
    model = AutoModelForCausalLM.from_pretrained(expert)
    base_weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    tensors = load_file(delta / "adapter_model.safetensors")
    modules = json.loads((delta / "adapter_config.json").read_text())["modules"]
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, module in model.named_modules():
            prefix = f"base_model.model.{name}.meswitch_delta."
            leaves = {key[len(prefix) :]: leaf for key, leaf in tensors.items() if key.startswith(prefix)}
            if modules.get(name, {}).get("kind") == "quantized_rows":
                module.weight.copy_(base_weights[f"{name}.weight"])
                change_rows(module.weight, modules[name], leaves)
            elif isinstance(module, nn.Linear | Conv1D) and module is not head:
                dense = dense_delta(modules[name], leaves)
                module.weight.copy_(
                    base_weights[f"{name}.weight"] + (dense.T if isinstance(module, Conv1D) else dense)
                )
    return model.eval()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
