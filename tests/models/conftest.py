from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.models.architectures import VOCABULARY, build, fine_tune
from tests.models.reference import reference_model
from transformers_meswitch import MESwitchConfig, compress


@dataclass(frozen=True)
class Case:
    """A base, a fine-tune and its delta on disk, with the model that the delta must equal."""

    base: Path
    expert: Path
    delta: Path
    reference: PreTrainedModel


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Int64 ``[2, 7]``: a prompt in two rows."""
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """A function that builds the case of an architecture, once for each set of arguments."""
    made: dict[tuple[object, ...], Case] = {}

    def make(model_type: str, tied: bool, bits: int, expert_tied: bool | None = None, hub_style: bool = False) -> Case:
        key = (model_type, tied, bits, expert_tied, hub_style)
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            base, expert, delta = (folder / name for name in ("base", "expert", "delta"))
            build(model_type, tied).save_pretrained(base)
            fine_tune(base, seed=1, tied=expert_tied).save_pretrained(expert)
            if hub_style:
                _as_on_the_hub(base)
                _as_on_the_hub(expert)
            compress(
                base, expert, delta, MESwitchConfig(bits=bits, salient_channels=3), calibration=None, progress=False
            )
            made[key] = Case(base, expert, delta, reference_model(base, expert, delta))
        return made[key]

    return make


def _as_on_the_hub(folder: Path) -> None:
    """Rewrite a GPT-2 checkpoint as openai-community/gpt2 has it: no prefix, and the causal mask as a tensor."""
    path = folder / "model.safetensors"
    tensors = {re.sub(r"^transformer\.", "", name): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save_file(tensors, path, metadata={"format": "pt"})
