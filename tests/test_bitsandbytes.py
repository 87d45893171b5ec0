"""Deltas over bitsandbytes bases on the CPU, against hooks on a stock quantised model.

The reference is the stock quantised base whose linears gain ``x Δᵀ`` with the dense Δ of the files (plain torch), and
whose embedding and norms are the expert's. Ours adds the same numbers in the same order, so float32 logits (standard
deviation about 2) agree within 1e-4.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.fixtures_models import TinyFamily, hooked_model
from tests.model_state import ATOL, generated, prompt
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.errors import UnsupportedOperationError

pytest.importorskip("bitsandbytes")

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """bitsandbytes has another, less rounded kernel for inputs that require gradients."""
    with torch.no_grad():
        yield


QUANTISATION = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(params=QUANTISATION)
def quantised(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments that load a base quantised."""
    return {"quantization_config": BitsAndBytesConfig(**QUANTISATION[request.param]), "dtype": torch.float32}


@pytest.mark.parametrize("name", ["math", "code"])
def test_stock_calls_give_quantised_base_plus_delta(
    tiny_family: TinyFamily, quantised: dict[str, Any], name: str
) -> None:
    delta = tiny_family.deltas[name]
    twin = hooked_model(tiny_family.base, delta, **quantised)
    model = AutoModelForCausalLM.from_pretrained(delta, **quantised)
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, **quantised)
    stock = base(prompt(rows=2)).logits
    wrapped = PeftModel.from_pretrained(base, delta)
    x = prompt(rows=2)
    for ours in (model, wrapped):
        torch.testing.assert_close(ours(x).logits, twin(x).logits, atol=ATOL, rtol=0)
        assert (ours(x).logits[..., :128] - stock).abs().max() > 100 * ATOL
    assert type(model.model.layers[0].mlp.up_proj.base_layer).__name__ in ("Linear4bit", "Linear8bitLt")
    assert generated(model) == generated(twin)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(x).logits[..., :128], stock)


def test_a_family_over_a_quantised_base_generates_mixed_rows(
    tiny_family: TinyFamily, quantised: dict[str, Any], tmp_path: Path
) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=tiny_family.deltas, **quantised)
    names = ["math", "code", None]
    x = prompt(rows=3)
    # bitsandbytes finds the outlier columns of 8-bit activations over the whole batch, so rows there are not apart.
    atol = 0.1 if quantised["quantization_config"].load_in_8bit else ATOL
    answer = model.generate(
        x, expert=names, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for row, name in enumerate(names):
        model.set_expert(name)
        alone = model(x[row : row + 1]).logits[0, -1]
        torch.testing.assert_close(answer.logits[0][row], alone, atol=atol, rtol=0)
        model.set_expert({"math": "code", "code": None, None: "math"}[name])
        other = model(x[row : row + 1]).logits[0, -1]
        assert (other - alone)[:128].abs().max() > 5 * atol
    for name in ("math", "code"):
        held = {f"base_model.model.{key}": tensor for key, tensor in model.get_adapter_state_dict(name).items()}
        stored = load_file(tiny_family.deltas[name] / WEIGHTS)
        assert held.keys() == stored.keys()
        assert all(torch.equal(held[key], tensor) for key, tensor in stored.items())


def test_saving_the_delta_is_bit_equal(tiny_family: TinyFamily, quantised: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"], **quantised)
    model.save_pretrained(tmp_path)
    written, stored = load_file(tmp_path / WEIGHTS), load_file(tiny_family.deltas["code"] / WEIGHTS)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in stored.items())


def test_merging_is_refused_by_name(tiny_family: TinyFamily, quantised: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"], **quantised)
    wrapped = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_family.base, **quantised), tiny_family.deltas["math"]
    )
    for ours in (model, wrapped):
        logits = ours(prompt()).logits
        for call in (ours.merge_adapter, ours.merge_and_unload):
            with pytest.raises(UnsupportedOperationError, match=r"Linear(4bit|8bitLt).*without quantization_config"):
                call()
        assert torch.equal(ours(prompt()).logits, logits)


def test_deleting_the_expert_leaves_the_quantised_base(tiny_family: TinyFamily, quantised: dict[str, Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, **quantised)
    logits = base(prompt()).logits
    kind = type(base)
    base.load_adapter(str(tiny_family.deltas["code"]), adapter_name="code")
    base.delete_adapter("code")
    assert type(base) is kind
    assert torch.equal(base(prompt()).logits, logits)


def test_a_family_records_how_its_base_was_quantised(
    tiny_family: TinyFamily, quantised: dict[str, Any], tmp_path: Path
) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=tiny_family.deltas, **quantised)
    model.save_pretrained(tmp_path / "family")
    recorded = json.loads((tmp_path / "family" / "config.json").read_text())["base_quantization"]
    assert BitsAndBytesConfig.from_dict(recorded).to_dict() == quantised["quantization_config"].to_dict()
    assert json.dumps(recorded) in (tmp_path / "family" / "README.md").read_text()
    plain = MESwitchModelForCausalLM.from_pretrained(tmp_path / "family")
    assert plain.dtype == torch.float32, "a record, not a wish"
    plain.save_pretrained(tmp_path / "family")
    assert json.loads((tmp_path / "family" / "config.json").read_text())["base_quantization"] is None
