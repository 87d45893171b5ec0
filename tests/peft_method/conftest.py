"""Models with experts, loaded afresh for each test, and the dense twins they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fixtures_models import VOCAB_SIZE, TinyFamily, dense_model
from tests.triton_interpreter import make_few_blocks

Answers = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_few_blocks(monkeypatch)


@pytest.fixture(scope="session")
def dense(tiny_family: TinyFamily) -> dict[str | None, Any]:
    """Stock models of base (`None`) and experts; read-only."""
    twins = {name: dense_model(tiny_family.base, delta) for name, delta in tiny_family.deltas.items()}
    return {None: AutoModelForCausalLM.from_pretrained(tiny_family.base), **twins}


@pytest.fixture
def model(tiny_family: TinyFamily) -> Any:
    """The base with both experts, ``code`` active, through transformers' calls."""
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    for name, delta in tiny_family.deltas.items():
        model.load_adapter(str(delta), adapter_name=name)
    return model


@pytest.fixture
def peft_model(tiny_family: TinyFamily) -> PeftModel:
    """The base with both experts, ``math`` active, through PEFT's calls."""
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    model = PeftModel.from_pretrained(base, tiny_family.deltas["math"], adapter_name="math")
    model.load_adapter(tiny_family.deltas["code"], adapter_name="code")
    return model


@pytest.fixture
def expected(dense: dict[str | None, Any]) -> Answers:
    """Logits that an expert must give, as wide as those of a model with both experts."""

    def logits(expert: str | None, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            own = dense[expert](inputs).logits
        return torch.nn.functional.pad(own, (0, VOCAB_SIZE + 4 - own.shape[-1]), value=float("-inf"))

    return logits
