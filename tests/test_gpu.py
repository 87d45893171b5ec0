"""The stock calls on a GPU over bf16, fp16, fp32 and bitsandbytes bases, against hooks on a stock base."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.fixtures_models import TinyFamily, hooked_model
from tests.model_state import prompt
from transformers_meswitch import MESwitchModelForCausalLM

pytestmark = pytest.mark.gpu
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
#: Arguments of the base, and by how much of the largest logit two correct computations may differ.
BASES = {
    "fp32": ({"dtype": torch.float32}, 1e-4),
    "fp16": ({"dtype": torch.float16}, 1e-2),
    "bf16": ({"dtype": torch.bfloat16}, 6e-2),
    "nf4": ({"dtype": torch.bfloat16, "quantization_config": NF4}, 6e-2),
    "int8": ({"dtype": torch.float16, "quantization_config": {"load_in_8bit": True}}, 6e-2),
}


@pytest.fixture(
    params=[pytest.param(name, marks=[needs_bitsandbytes] if name in ("nf4", "int8") else []) for name in BASES]
)
def loaded(request: pytest.FixtureRequest) -> tuple[dict[str, Any], float]:
    """Arguments that load a base on the GPU, and the tolerance."""
    arguments, tolerance = BASES[request.param]
    arguments = {**arguments, "device_map": "cuda"}
    if "quantization_config" in arguments:
        arguments["quantization_config"] = BitsAndBytesConfig(**arguments["quantization_config"])
    return arguments, tolerance


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest logit; infinite where one of them knows an id that the other does not."""
    assert torch.equal(ours.isinf(), theirs.isinf())
    known = ~theirs.isinf()
    return float((ours[known].float() - theirs[known].float()).abs().max() / theirs[known].float().abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", ["math", "code"])
def test_stock_calls_give_base_plus_delta(tiny_family: TinyFamily, loaded: Any, name: str) -> None:
    arguments, tolerance = loaded
    delta, x = tiny_family.deltas[name], prompt(rows=2).cuda()
    expected = hooked_model(tiny_family.base, delta, **arguments)(x).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, **arguments)
    stock = base(x).logits
    model = AutoModelForCausalLM.from_pretrained(delta, **arguments)
    wrapped = PeftModel.from_pretrained(base, delta)
    for ours in (model, wrapped):
        assert error(ours(x).logits, expected) < tolerance
        assert error(ours(x).logits[..., : stock.shape[-1]], stock) > 2 * tolerance
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(x).logits[..., : stock.shape[-1]], stock)


@torch.no_grad()
def test_mixed_rows_on_a_gpu(tiny_family: TinyFamily, loaded: Any) -> None:
    arguments, tolerance = loaded
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=tiny_family.deltas, **arguments)
    names, x = ["math", "code", None], prompt(rows=3).cuda()
    answer = model.generate(
        x, expert=names, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for row, name in enumerate(names):
        model.set_expert(name)
        alone = model(x[row : row + 1]).logits[:, -1]
        assert error(answer.logits[0][row : row + 1], alone) < tolerance
        model.set_expert({"math": "code", "code": "math", None: "math"}[name])
        other = model(x[row : row + 1]).logits[:, -1, :128]
        assert error(other, alone[:, :128]) > tolerance


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_on_a_gpu_is_undone_bit_for_bit(tiny_family: TinyFamily, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"], dtype=dtype, device_map="cuda")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = prompt().cuda()
    logits = model(x).logits
    model.merge_adapter(safe_merge=True)
    assert error(model(x).logits, logits) < (1e-4 if dtype == torch.float32 else 6e-2)
    assert not torch.equal(
        model.model.layers[0].mlp.up_proj.base_layer.weight, before["model.layers.0.mlp.up_proj.base_layer.weight"]
    )
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_switching_allocates_nothing_on_the_gpu(tiny_family: TinyFamily) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=tiny_family.deltas, device_map="cuda")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for name in ("math", "code", None, "math"):
        model.set_expert(name)
    assert torch.cuda.max_memory_allocated() == held
