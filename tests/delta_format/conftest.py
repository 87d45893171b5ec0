from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_meswitch.configuration import MESwitchExpertConfig
from transformers_meswitch.delta_format.spec import tensor_key

FROZEN = Path(__file__).parent.parent / "fixtures" / "delta_v1"


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """A copy of the frozen version 1 delta, to be damaged at will."""
    return Path(shutil.copytree(FROZEN, tmp_path / "frozen"))


@pytest.fixture
def make_delta() -> Callable[..., tuple[MESwitchExpertConfig, dict[str, torch.Tensor]]]:
    """A function from a number to a small valid delta, different for each number, of any version of the weights."""

    def make(number: int, layers: int = 2, **fields: Any) -> tuple[MESwitchExpertConfig, dict[str, torch.Tensor]]:
        modules: dict[str, dict[str, Any]] = {}
        tensors = {}
        for layer in range(layers):
            name = f"model.layers.{layer}.mlp.up_proj"
            modules[name] = {"kind": "linear", "out_features": 3, "in_features": 8, "bits": 2}
            tensors[tensor_key(name, "codes")] = torch.full((3, 2), number, dtype=torch.uint8)
            tensors[tensor_key(name, "step")] = torch.full((3,), float(number))
        modules["model.embed_tokens"] = {"kind": "rows", "num_rows": 4, "width": 2, "rows": 2}
        tensors[tensor_key("model.embed_tokens", "row_index")] = torch.tensor([1, 3], dtype=torch.int32)
        tensors[tensor_key("model.embed_tokens", "rows")] = torch.full((2, 2), float(number), dtype=torch.bfloat16)
        config = MESwitchExpertConfig(
            **{"base_model_name_or_path": "me/base", "task_type": "CAUSAL_LM", "modules": modules} | fields
        )
        return config, tensors

    return make
