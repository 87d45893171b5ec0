"""A tiny base, an expert of it, and what methods are given of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.calibration import collect_moments
from benchmarks.quality.decoding import ATTENTION
from benchmarks.quality.methods import Inputs
from benchmarks.quality.smoke import tiny_base


@dataclass
class Pair:
    """Folders of a base and a full fine-tune of it, and the inputs made of them."""

    base: Path
    expert: Path
    inputs: Inputs


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_base(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval().requires_grad_(False)
    before = {key: value.clone() for key, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(folder / "expert")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "expert")
    after = {key: value.clone() for key, value in model.named_parameters()}
    model.set_attn_implementation(ATTENTION)
    sequences = [
        (torch.randint(3, 259, (int(length),), generator=generator).tolist(), int(length) // 2)
        for length in torch.randint(8, 40, (24,), generator=generator)
    ]
    inputs = Inputs(model, before, after, collect_moments(model, sequences), sequences)
    # Of all letters, since weights are free to be anything for inputs that no text has.
    letters = [torch.randint(32, 127, (60,), generator=generator).tolist() for _ in range(24)]
    inputs.base_folder, inputs.texts = base, ["".join(map(chr, codes)) for codes in letters]
    return Pair(base, folder / "expert", inputs)
