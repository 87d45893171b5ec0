from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.architectures import build, fine_tune
from transformers_meswitch import MESwitchConfig, compress
from transformers_meswitch.errors import UnsupportedModelError
from transformers_meswitch.module_kinds import module_kinds

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8},
}


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a mixture-of-experts ``base`` and its fine-tune ``expert``."""
    build(request.param, False, **MIXTURES[request.param]).save_pretrained(tmp_path / "base")
    fine_tune(tmp_path / "base", seed=1).save_pretrained(tmp_path / "expert")
    return tmp_path


def test_compress_names_the_fused_layer(mixture: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.\w+\.experts.*not supported"):
        compress(mixture / "base", mixture / "expert", mixture / "delta", calibration=None, progress=False)
    assert not (mixture / "delta" / "adapter_config.json").exists()


def test_quantizer_names_the_fused_layer(mixture: Path) -> None:
    config = MESwitchConfig(str(mixture / "base"))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.\w+\.experts.*not supported"):
        AutoModelForCausalLM.from_pretrained(mixture / "expert", quantization_config=config)


def test_a_convolution_is_not_called_a_mixture_of_experts(tmp_path: Path) -> None:
    class WithTower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embedding = torch.nn.Conv2d(3, 4, 2)

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(UnsupportedModelError, match=r"patch_embedding\.weight.*convolution.*multimodal"):
        module_kinds(WithTower())  # type: ignore[arg-type]
