"""What a model is at a moment, so that a test can say that nothing of it changed."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

#: Two float32 ways of one sum: (W + Δ)x and Wx + Δx, on logits of the order of 1.
ATOL = 1e-4


def prompt(rows: int = 1) -> torch.Tensor:
    """Token ids ``[rows, 5]`` that every vocabulary of the tiny family knows, changed rows among them."""
    return torch.tensor([[1, 50, 43, 5, 41], [1, 7, 90, 61, 33], [1, 100, 40, 8, 127]])[:rows]


def generated(model: Any, inputs: torch.Tensor | None = None, **kwargs: Any) -> list[list[int]]:
    """Greedy continuation of 8 tokens."""
    inputs = prompt() if inputs is None else inputs
    return model.generate(inputs, **{"max_new_tokens": 8, "do_sample": False, **kwargs}).tolist()


class ModelState:
    """Everything of a model that a failed call must leave as it was."""

    def __init__(self, model: Any) -> None:
        self.kind = type(model)
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.storages = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        self.config = model.config.to_dict()
        self.generation_config = model.generation_config.to_dict()
        self.adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
        # From the layers: transformers 5.24 answers active_adapters() of a LoRA only with a PEFT not released yet.
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.active = [layer.active_adapters for layer in layers]
        self.experts = getattr(model, "experts", [])
        self.modules = [(name, type(module)) for name, module in model.named_modules()]
        self.attributes = set(model.__dict__)
        self.trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.training = model.training
        self.answer = generated(model)

    def assert_unchanged(self, model: Any) -> None:
        """Compare bit by bit."""
        now = ModelState(model)
        assert now.tensors.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(now.tensors[name], tensor), name
        for attribute in (a for a in vars(self) if a != "tensors"):
            assert getattr(now, attribute) == getattr(self, attribute), attribute
