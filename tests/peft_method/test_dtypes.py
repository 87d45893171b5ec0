"""Bases in half precision: the expert within the rounding of that precision, deltas in their own dtypes.

Tolerance: logits of these models have a standard deviation of about 2. The reference is a stock model of base + delta,
summed in float32 and rounded once; ours rounds the base, each layer's correction and their sum. Allowed is a relative
error (Frobenius norm over all logits) of 4 % in bfloat16 (8 significant bits) and 0.5 % in float16 (11 bits), a few
times what the stock half-precision model itself loses against float32, and far below the distance between experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fixtures_models import TinyFamily, dense_model
from tests.model_state import prompt

TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 1e-5}


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    width = min(left.shape[-1], right.shape[-1])
    left, right = left[..., :width].float(), right[..., :width].float()
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["math", "code"])
def test_an_expert_over_a_base_of_each_precision(tiny_family: TinyFamily, name: str, dtype: torch.dtype) -> None:
    twin = dense_model(tiny_family.base, tiny_family.deltas[name], dtype)
    other = dense_model(tiny_family.base, tiny_family.deltas["code" if name == "math" else "math"], dtype)
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, dtype=dtype)
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(tiny_family.deltas[name], dtype=dtype),
        PeftModel.from_pretrained(base, tiny_family.deltas[name]),
    ]
    x = prompt(rows=3)
    with torch.no_grad():
        for model in models:
            logits = model(x).logits
            assert logits.dtype == dtype
            assert distance(logits, twin(x).logits) < TOLERANCE[dtype]
            assert distance(logits, other(x).logits) > 0.3
    for model in models:
        stored = {k: t for k, t in model.state_dict().items() if k.endswith((".step", ".codes", ".salient"))}
        assert {k.rpartition(".")[2]: t.dtype for k, t in stored.items()} == {
            "step": torch.float32,
            "codes": torch.uint8,
            "salient": torch.bfloat16,
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_rows_and_merging_in_half_precision(tiny_family: TinyFamily, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base, dtype=dtype)
    for name, delta in tiny_family.deltas.items():
        model.load_adapter(str(delta), adapter_name=name)
    x = prompt(rows=3)
    answer = model.generate(
        x, expert=["math", "code", None], max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        for row, name in enumerate(["math", "code"]):
            twin = dense_model(tiny_family.base, tiny_family.deltas[name], dtype)
            last = twin(x).logits[row, -1]
            assert distance(answer.logits[0][row], last) < TOLERANCE[dtype]
            model.set_expert(name)
            model.merge_adapter(safe_merge=True)
            merged = {n: p for n, p in model.named_parameters() if "up_proj.base_layer" in n}
            for key, parameter in merged.items():
                # Both form base + delta in float32 and round once.
                assert torch.equal(parameter, twin.state_dict()[key.replace(".base_layer", "")])
            model.unmerge_adapter()
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, dtype=dtype).state_dict()
    ours = {k.replace(".base_layer", ""): t for k, t in model.state_dict().items() if ".meswitch_delta." not in k}
    assert ours.keys() == base.keys()
    assert all(torch.equal(ours[key], base[key]) for key in base)
