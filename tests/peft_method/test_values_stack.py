"""The stack of experts' norm weights has room for any number of experts."""

from __future__ import annotations

import torch
from torch import nn

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
