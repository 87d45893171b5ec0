"""Linear layers through the kernels against the same layers made dense: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch

from tests.fixtures_models import TinyFamily, build_tiny_family
from tests.model_state import prompt
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.peft_method import joint_linears, kernel_path
from transformers_meswitch.peft_method.injection import wrapped_layers
from transformers_meswitch.peft_method.linear_layer import LinearLayer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU; interpreted by test_in_the_interpreter"
)
DEVICE = "cpu" if INTERPRETED else "cuda"


#: The interpreter's time goes by the number of launches.
LAYERS = 1 if INTERPRETED else 2
UNCHANGED_IN_MATH = f"model.layers.{LAYERS - 1}.mlp.down_proj"


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    folder = tmp_path_factory.mktemp("small-family")
    return build_tiny_family(folder, unchanged=UNCHANGED_IN_MATH, num_hidden_layers=LAYERS)


@pytest.fixture
def model(tiny_family: TinyFamily) -> Any:
    return MESwitchModelForCausalLM.from_pretrained(
        tiny_family.base, experts=tiny_family.deltas, dtype=torch.float32, device_map=DEVICE
    )


@torch.no_grad()
def logits(model: Any, experts: list[str | None], x: torch.Tensor, monkeypatch: Any, *, dense: bool) -> torch.Tensor:
    """Logits of rows of experts, with linears through the kernels, or with their deltas made dense."""
    with monkeypatch.context() as patched:
        if dense:
            patched.setattr(kernel_path, "MAX_ROWS", 0)
            patched.setattr(kernel_path.KernelPath, "prefill", lambda *_: None)
        with model._meswitch_switch.rows(experts):
            return model(x).logits


def check(model: Any, experts: list[str | None], monkeypatch: Any, tolerance: float = 1e-5, tokens: int = 2) -> None:
    """Both ways agree, and neither is the base's answer."""
    x = prompt(rows=len(experts)).repeat(1, 4)[:, :tokens].to(DEVICE)
    ours, expected = (logits(model, experts, x, monkeypatch, dense=dense) for dense in (False, True))
    known = expected.isfinite()
    assert torch.equal(ours.isfinite(), known)
    largest = expected[known].abs().max()
    assert (ours[known] - expected[known]).abs().max() <= tolerance * largest
    if any(experts):
        base = logits(model, [None] * len(experts), x, monkeypatch, dense=True)
        assert (base[known] - expected[known]).abs().max() > 100 * tolerance * largest


def linears(model: Any) -> list[LinearLayer]:
    return [layer for layer in wrapped_layers(model).values() if isinstance(layer, LinearLayer)]


@needs_kernels
@pytest.mark.parametrize(
    "experts",
    [
        ["math"],
        ["code", None, "code"],
        pytest.param(["code", "code"], marks=SLOW),
        pytest.param(["math", None, "code"], marks=SLOW),
    ],
    ids=str,
)
def test_kernels_give_what_dense_deltas_give(model: Any, experts: list[str | None], monkeypatch: Any) -> None:
    used = []
    one, several = kernel_path.fused_linear, joint_linears.fused_linears
    monkeypatch.setattr(kernel_path, "fused_linear", lambda *args: used.append(1) or one(*args))
    monkeypatch.setattr(
        joint_linears, "fused_linears", lambda x, w, *rest: used.append(len(w)) or several(x, w, *rest)
    )
    check(model, experts, monkeypatch)
    assert sum(used) == len(linears(model))
    assert any(layer.delta_of("math") is None for layer in linears(model)), UNCHANGED_IN_MATH


@needs_kernels
def test_codes_are_loaded_into_padded_memory(tiny_family: TinyFamily, monkeypatch: Any) -> None:
    """Rather than padded afterwards, when a layer's codes would be there twice."""
    moved, align = [], kernel_path.align_rows

    def watched(codes: torch.Tensor) -> torch.Tensor:
        aligned = align(codes)
        moved.append(aligned.data_ptr() != codes.data_ptr())
        return aligned

    monkeypatch.setattr(kernel_path, "align_rows", watched)
    model = MESwitchModelForCausalLM.from_pretrained(
        tiny_family.base, experts=tiny_family.deltas, dtype=torch.float32, device_map=DEVICE
    )
    assert len(moved) > len(linears(model))
    assert not any(moved)


@needs_kernels
def test_a_slot_is_used_again_by_the_next_expert(tiny_family: TinyFamily, model: Any, monkeypatch: Any) -> None:
    tables = {layer: layer._kernels._table for layer in linears(model)}
    slot = model._meswitch_switch.slots.of("code")
    model.delete_adapter("code")
    model.load_adapter(tiny_family.deltas["code"], adapter_name="again")
    assert model._meswitch_switch.slots.of("again") == slot
    # A layer that no other expert changes has waited for it.
    assert any(layer.delta_of("math") is None for layer in tables)
    assert {layer: layer._kernels._table for layer in linears(model)} == tables
    check(model, ["math", "again"], monkeypatch)


@needs_kernels
def test_a_slot_that_was_exchanged_is_noticed(model: Any, monkeypatch: Any) -> None:
    slots = model._meswitch_switch.slots
    slots._of = {"math": slots.of("code"), "code": slots.of("math")}
    with pytest.raises(AssertionError):
        check(model, ["math", "code"], monkeypatch)


@needs_kernels
def test_moved_and_cast_models_go_on(model: Any, monkeypatch: Any) -> None:
    model.to(torch.bfloat16).to("cpu").to(DEVICE)
    check(model, ["math", "code"], monkeypatch, tolerance=2e-2)


@needs_kernels
def test_a_copy_reads_tensors_of_its_own(model: Any, monkeypatch: Any) -> None:
    twin = copy.deepcopy(model)
    for ours, theirs in zip(linears(model), linears(twin), strict=True):
        rows, others = ours._kernels._table.rows, theirs._kernels._table.rows
        used = rows[:, 0] != 0
        assert torch.equal(used, others[:, 0] != 0)
        assert not (rows[used, 0] == others[used, 0]).any()
    for layer in linears(model):
        for delta in layer.meswitch_delta.values():
            delta.step.data.fill_(float("nan"))
    check(twin, ["math", "code"], monkeypatch)


@needs_kernels
def test_what_is_saved_is_what_was_loaded(tiny_family: TinyFamily, model: Any, tmp_path: Any) -> None:
    padded = [d for layer in linears(model) for d in layer.meswitch_delta.values() if not d.codes.is_contiguous()]
    assert padded, "no codes whose rows had to be padded"
    model.set_expert("code")
    name = "adapter_model.safetensors"
    single = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"code": tiny_family.deltas["code"]})
    single.set_expert("code")
    single._meswitch_family = None
    single.save_pretrained(tmp_path)
    assert (tmp_path / name).read_bytes() == (tiny_family.deltas["code"] / name).read_bytes()
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})


@needs_kernels
def test_gradients_go_through_dense_deltas(model: Any) -> None:
    layer = linears(model)[0]
    model.set_expert("code")
    x = torch.randn(1, 2, layer.in_features, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    dense = layer.base_layer.weight + layer.delta_of("code").weight(torch.float32)
    assert torch.allclose(x.grad, dense.sum(0).expand_as(x), atol=1e-4)


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="runs the tests above")
def test_in_the_interpreter(slow: bool) -> None:
    check_interpreted(
        __file__,
        test_kernels_give_what_dense_deltas_give,
        test_codes_are_loaded_into_padded_memory,
        test_a_slot_is_used_again_by_the_next_expert,
        test_a_slot_that_was_exchanged_is_noticed,
        test_moved_and_cast_models_go_on,
        test_a_copy_reads_tensors_of_its_own,
        test_what_is_saved_is_what_was_loaded,
        test_gradients_go_through_dense_deltas,
        slow=slow,
    )
