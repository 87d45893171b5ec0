"""The stack of experts' norm weights has room for any number of experts."""

from __future__ import annotations

import pickle

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from transformers_meswitch.peft_method.slots import ROOM
from transformers_meswitch.peft_method.values_stack import ValuesStack


def test_more_experts_than_there_is_room_for_at_first() -> None:
    base = nn.LayerNorm(4)
    stack = ValuesStack(base)
    slots = [0, ROOM - 1, ROOM, 3 * ROOM]
    for slot in slots:
        stack.put(f"expert{slot}", slot, {"weight": torch.full((4,), float(slot)), "bias": torch.full((4,), -1.0)})
    picked = stack.pick(base, torch.tensor([*slots, ROOM + 1, -1], dtype=torch.int32))
    assert picked["weight"][:, 0].tolist() == [*map(float, slots), 1.0, 1.0]
    assert picked["bias"][:, 0].tolist() == [-1.0] * len(slots) + [0.0, 0.0]
    stack.clear(f"expert{ROOM}")
    assert stack.pick(base, torch.tensor([ROOM]))["weight"][0].tolist() == [1.0] * 4


def test_a_norm_that_was_cast_without_its_stack_takes_no_kernel() -> None:
    """Preparing a model for training casts parameters, and buffers stay as they were."""
    base = LlamaRMSNorm(8).bfloat16().requires_grad_(False)
    stack = ValuesStack(base)
    x = torch.randn(2, 1, 8)
    assert stack.norms(base, x.bfloat16())
    base.weight.data = base.weight.data.float()
    stack.ask(base)
    stack.put("later", 0, {"weight": torch.full((8,), 2.0)})
    assert not stack.norms(base, x)
    assert stack.pick(base, torch.tensor([0, -1]))["weight"][:, 0].tolist() == [2.0, 1.0]


def test_a_copy_asks_anew() -> None:
    base = LlamaRMSNorm(8).requires_grad_(False)
    stack, x = ValuesStack(base), torch.randn(2, 1, 8)
    assert stack.norms(base, x)
    twin = pickle.loads(pickle.dumps(stack))
    assert not twin.norms(base, x)
    twin.ask(base)
    assert twin.norms(base, x)
