"""A model with experts as a Python object: pickled, copied, its class used again, gradients asked of all of it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.fixtures_models import TinyFamily
from tests.model_state import generated, prompt


@pytest.fixture(params=["model", "peft_model"])
def either(request: pytest.FixtureRequest) -> Any:
    """A model with both experts by either library's calls."""
    return request.getfixturevalue(request.param)


def saved_and_loaded(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [saved_and_loaded, copy.deepcopy])
def test_a_copy_is_a_model_of_its_own(either: Any, copied: Any) -> None:
    either.set_adapter("math")
    other = copied(either)
    assert type(other) is type(either)
    assert torch.equal(other(prompt()).logits, either(prompt()).logits)
    other.set_adapter("code")
    assert torch.equal(other(prompt()).logits, either.set_adapter("code") or either(prompt()).logits)
    either.set_adapter("math")
    assert not torch.equal(other(prompt()).logits, either(prompt()).logits)


def test_the_class_makes_plain_models(model: Any, tiny_family: TinyFamily) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    again = type(model).from_pretrained(tiny_family.base)
    assert type(again) is type(type(model)(stock.config)) is LlamaForCausalLM
    assert generated(again) == generated(stock)
    assert type(model).from_pretrained(tiny_family.deltas["math"]).experts == ["default"]


def test_gradients_asked_of_the_whole_model_are_the_bases(either: Any) -> None:
    assert either.requires_grad_(True) is either
    deltas = {name: p.requires_grad for name, p in either.named_parameters() if ".meswitch_delta." in name}
    assert deltas
    assert not any(deltas.values())
    assert all(p.requires_grad for name, p in either.named_parameters() if name not in deltas)
    either.requires_grad_(False)
    assert not any(p.requires_grad for p in either.parameters())
