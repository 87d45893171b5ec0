"""Linear layers of many rows through scratch memory against deltas made dense: on a GPU, or in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from meswitch_kernels import prefill
from tests.fixtures_models import TinyFamily, build_tiny_family
from tests.model_state import prompt
from tests.peft_method.test_kernel_path import (
    DEVICE,
    INTERPRETED,
    LAYERS,
    check,
    linears,
    model,
    needs_kernels,
    tiny_family,
)
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.peft_method import kernel_path

__all__ = ["model", "tiny_family"]

TOKENS = 17


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each chunk written to scratch memory, whether it was ahead; these layers are one chunk each."""
    written: list[bool] = []
    write = prefill._Chunk.write
    monkeypatch.setattr(
        prefill._Chunk, "write", lambda self, memory, ahead: written.append(ahead) or write(self, memory, ahead)
    )
    return written


def run(model: Any, experts: list[str | None]) -> torch.Tensor:
    with torch.no_grad(), model._meswitch_switch.rows(experts):
        return model(prompt(rows=len(experts)).repeat(1, 4)[:, :TOKENS].to(DEVICE)).logits


@needs_kernels
@pytest.mark.parametrize(
    "experts",
    [pytest.param(["math"], marks=SLOW), pytest.param(["code", "code"], marks=SLOW), ["math", None, "code"]],
    ids=str,
)
def test_scratch_weights_give_what_dense_deltas_give(
    model: Any, experts: list[str | None], monkeypatch: Any, writes: list[bool]
) -> None:
    monkeypatch.setattr(kernel_path, "fused_linear", lambda *_: pytest.fail("through the kernels for few rows"))
    changed = sum(layer.delta_of(expert) is not None for layer in linears(model) for expert in {*experts} - {None})
    # The first call has nothing to go by but the experts of each layer.
    run(model, experts)
    assert len(writes) == changed
    del writes[:]
    check(model, experts, monkeypatch, tokens=TOKENS)
    assert writes == [False] + [True] * (changed - 1)


@needs_kernels
def test_a_wrong_slot_is_noticed(model: Any, monkeypatch: Any) -> None:
    for layer in linears(model):
        layer._kernels._slots = {"math": 1, "code": 0}
    with pytest.raises(AssertionError):
        check(model, ["math", "code"], monkeypatch, tokens=TOKENS)


@needs_kernels
def test_biases_are_the_experts_own(tmp_path: Path, monkeypatch: Any) -> None:
    family = build_tiny_family(tmp_path, attention_bias=True, num_hidden_layers=LAYERS)
    model = MESwitchModelForCausalLM.from_pretrained(
        family.base, experts=family.deltas, dtype=torch.float32, device_map=DEVICE
    )
    assert any(layer.delta_of("math").record.bias for layer in linears(model) if layer.delta_of("math"))
    check(model, ["math", None, "code"], monkeypatch, tokens=TOKENS)


@needs_kernels
def test_an_expert_exchanged_between_calls_answers_itself(
    tiny_family: TinyFamily, model: Any, monkeypatch: Any, writes: list[bool]
) -> None:
    run(model, ["math"])
    run(model, ["code"])
    slot = model._meswitch_switch.slots.of("code")
    model.delete_adapter("code")
    model.load_adapter(tiny_family.deltas["code"], adapter_name="again")
    assert model._meswitch_switch.slots.of("again") == slot
    check(model, ["again"], monkeypatch, tokens=TOKENS)
    # The order is known as soon as it was seen once more.
    del writes[:]
    run(model, ["again"])
    assert writes.count(False) == 1


@needs_kernels
def test_a_call_broken_off_leaves_nothing_behind(model: Any, monkeypatch: Any, writes: list[bool]) -> None:
    """What it wrote ahead is not taken for the weight of an expert that changed since."""
    run(model, ["math"])
    run(model, ["math"])
    layers = linears(model)
    handle = layers[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, ["math"])
    handle.remove()
    assert writes[-1], "the layer that was not reached was not written ahead"
    layers[3].delta_of("math").step.data.mul_(3)
    check(model, ["math"], monkeypatch, tokens=TOKENS)


@needs_kernels
def test_layers_called_outside_of_the_model_write_nothing_ahead(
    model: Any, monkeypatch: Any, writes: list[bool]
) -> None:
    run(model, ["math"])
    run(model, ["math"])
    del writes[:]
    layer = linears(model)[0]
    model.set_expert("math")
    x = torch.randn(1, TOKENS, layer.in_features, device=DEVICE)
    with torch.no_grad():
        ours = layer(x)
    assert writes == [False]
    dense = x @ (layer.base_layer.weight + layer.delta_of("math").weight(torch.float32)).T
    assert torch.allclose(ours, dense, rtol=0, atol=1e-4 * float(dense.abs().max()))


@needs_kernels
@torch.no_grad()
def test_moved_and_cast_models_multiply_by_the_merged_weight(model: Any) -> None:
    run(model, ["math", "code"])
    model.to(torch.bfloat16).to("cpu").to(DEVICE)
    model.set_expert("math")
    layers = [layer for layer in linears(model) if layer.delta_of("math") is not None]
    for layer in layers:
        x = torch.randn(1, TOKENS, layer.in_features, dtype=torch.bfloat16, device=DEVICE)
        merged = layer.merged_parameters("math")["weight"]
        plain = F.linear(x, merged)
        # A GPU's library may choose another matmul for one that writes into memory that is there.
        tolerance = 0 if DEVICE == "cpu" else 5e-3
        assert (layer(x) - plain).float().norm() <= tolerance * plain.float().norm()
        assert not torch.equal(merged, layer.base_layer.weight)


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="runs the tests above")
def test_in_the_interpreter(slow: bool) -> None:
    check_interpreted(
        __file__,
        test_scratch_weights_give_what_dense_deltas_give,
        test_a_wrong_slot_is_noticed,
        test_biases_are_the_experts_own,
        test_an_expert_exchanged_between_calls_answers_itself,
        test_a_call_broken_off_leaves_nothing_behind,
        test_layers_called_outside_of_the_model_write_nothing_ahead,
        test_moved_and_cast_models_multiply_by_the_merged_weight,
        slow=slow,
    )
