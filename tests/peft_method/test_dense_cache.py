"""Experts on a CPU: their dense weights are made once, answer as before, and are never another's or old ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.fixtures_models import TinyFamily, dense_model
from tests.model_state import ATOL, prompt
from transformers_meswitch import MESwitchModelForCausalLM, ops
from transformers_meswitch.delta_format.spec import LinearRecord
from transformers_meswitch.peft_method import dense_cache
from transformers_meswitch.peft_method.linear_layer import LinearLayer
from transformers_meswitch.peft_method.switch import ExpertInfo, ExpertSwitch


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, tiny_family: TinyFamily) -> Any:
    return MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=tiny_family.deltas, dtype=request.param)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every delta that is made dense."""
    calls: list[int] = []
    original = ops.dequantize_delta
    monkeypatch.setattr(ops, "dequantize_delta", lambda *a: calls.append(1) or original(*a))
    return calls


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(rows=2)).logits


def test_deltas_are_made_dense_once_for_an_expert(model: Any, made: list[int]) -> None:
    model.set_expert("math")
    first = logits(model)
    assert made
    made.clear()
    assert torch.equal(logits(model), first)
    assert not made
    model.set_expert("code")
    code = logits(model)
    # Of the embedding, the rows that are asked for are made dense in every call.
    assert made
    model.set_expert("math")
    assert torch.equal(logits(model), first)
    assert not torch.equal(code[..., : first.shape[-1]], first)


def test_deltas_of_a_mixed_batch_are_made_dense_once(model: Any, made: list[int]) -> None:
    def mixed(*names: str | None) -> torch.Tensor:
        with torch.no_grad(), model._meswitch_switch.rows(names):
            return model(prompt().expand(len(names), -1)).logits

    def kept() -> int:
        return len(model.model.layers[0].mlp.down_proj._dense._kept)

    first = mixed("math", None, "code", "math")
    assert made
    assert kept() == 2
    made.clear()
    assert torch.equal(mixed("math", None, "code", "math"), first)
    # The memory of experts that are not in the batch goes, and not that of the others.
    mixed("math", None)
    assert kept() == 1
    made.clear()
    mixed("math", "math")
    assert not made
    # An expert alone answers by the same weights as in company.
    for row, name in enumerate(["math", None, "code"]):
        alone = mixed(name, name)[0]
        assert torch.allclose(alone, first[row], atol=1e-5 if model.dtype == torch.float32 else 0.05)
    assert not torch.allclose(first[0, :, :64], first[2, :, :64], atol=0.05)
    # Whoever of the batch goes on alone.
    for name in ("code", "math"):
        mixed("math", "code")
        assert kept() == 2
        mixed(name)
        assert kept() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_half_precision_are_those_of_merging(dtype: torch.dtype, tiny_family: TinyFamily) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=tiny_family.deltas, dtype=dtype)
    for name in ("math", "code"):
        model.set_expert(name)
        answer = logits(model)
        model.merge_adapter()
        merged = logits(model)
        assert torch.equal(answer, merged)
        model.unmerge_adapter()


@pytest.mark.parametrize("name", ["math", "code"])
def test_answers_are_those_of_the_dense_expert(tiny_family: TinyFamily, name: str) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=tiny_family.deltas)
    model.set_expert(name)
    with torch.no_grad():
        expected = dense_model(tiny_family.base, tiny_family.deltas[name])(prompt(rows=2)).logits
    assert torch.allclose(logits(model)[..., : expected.shape[-1]], expected, atol=ATOL)


def test_tensors_that_change_are_noticed(model: Any) -> None:
    model.set_expert("math")
    before = logits(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    changed = {key: 2 * value if key.endswith(".step") else value for key, value in state.items()}
    model.load_state_dict(changed)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    model.load_state_dict(state)
    assert torch.equal(logits(model), before)


def test_nothing_is_kept_where_memory_is_short(model: Any, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_cache, "free_share", lambda: 0.24)
    model.set_expert("math")
    first = logits(model)
    made.clear()
    assert torch.equal(logits(model), first)
    assert made


def test_gradients_do_not_go_through_what_is_kept(model: Any) -> None:
    model.set_expert("math")
    logits(model)
    embeds = torch.randn(1, 3, 64, dtype=model.dtype, requires_grad=True)
    model(inputs_embeds=embeds).logits[..., :64].float().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def test_what_is_made_in_inference_mode_serves_outside_of_it(model: Any) -> None:
    model.set_expert("math")
    with torch.inference_mode():
        model(prompt())
    embeds = torch.randn(1, 3, 64, dtype=model.dtype, requires_grad=True)
    model(inputs_embeds=embeds)
    with torch.no_grad():
        model(prompt())


def test_a_module_that_stands_in_for_a_delta_is_called(model: Any) -> None:
    model.set_expert("math")
    before = logits(model)
    layer: Any = model.model.layers[0].mlp.down_proj
    delta = layer.stored_delta("math")

    class Twice(torch.nn.Module):
        record = delta.record

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * delta(x)

    layer.stand_in("math", Twice())
    assert not torch.allclose(logits(model), before, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_expert_in_the_memory_of_another_is_noticed(dtype: torch.dtype) -> None:
    layer = LinearLayer(torch.nn.Linear(64, 64, bias=False, dtype=dtype), ExpertSwitch(base_vocab_size=8))
    record = LinearRecord(64, 64, 2)
    x = torch.randn(2, 1, 64, dtype=dtype)
    for number in range(40):
        layer.switch.enter("a", ExpertInfo(vocab_size=8))
        layer.add_delta("a", record)
        delta = layer.stored_delta("a")
        delta.assign("codes", torch.randint(0, 256, (64, 16), dtype=torch.uint8), torch.device("cpu"))
        delta.assign("step", torch.rand(64) + number, torch.device("cpu"))
        layer.switch.set_active(["a"])
        with torch.no_grad():
            weight = layer.base_layer.weight.float() + delta.weight(torch.float32)
            assert torch.allclose(layer(x), x @ weight.to(dtype).T, rtol=1e-2, atol=0.5)
        layer.delete_adapter("a")
        assert not layer._dense._kept


def test_memory_is_given_back(model: Any) -> None:
    def kept() -> int:
        return sum(len(layer._dense._kept) for layer in model.modules() if hasattr(layer, "_dense"))

    for gone in (lambda: model.merge_adapter(), lambda: model.to(torch.float64), lambda: model.delete_adapter("math")):
        model.unmerge_adapter()
        model.set_expert("math")
        logits(model)
        assert kept()
        gone()
        assert not kept()


def test_models_loaded_in_inference_mode_answer(tiny_family: TinyFamily) -> None:
    with torch.inference_mode():
        model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=tiny_family.deltas)
        model.set_expert("code")
        first = model(prompt()).logits
        assert torch.equal(model(prompt()).logits, first)


def test_a_layer_can_be_traced(model: Any) -> None:
    model.set_expert("math")
    logits(model)
    layer: Any = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 2, 64, dtype=model.dtype)
    with torch.no_grad():
        assert torch.allclose(torch.jit.trace(layer, (x,), check_trace=False)(x), layer(x), atol=1e-1)


@pytest.mark.parametrize("name", ["math", "code"])
@pytest.mark.parametrize("part", ["input_layernorm", "mlp.up_proj"])
def test_layers_that_answer_again_see_what_changed(model: Any, part: str, name: str) -> None:
    """What the short way of an expert that answers once more has to look at."""
    layer: Any = model.model.layers[0].get_submodule(part)
    x = torch.randn(2, 3, 64, dtype=model.dtype)
    model.set_expert(name)

    @torch.no_grad()
    def output(times: int = 3) -> torch.Tensor:
        found = [layer(x) for _ in range(times)]
        assert all(torch.equal(found[0], again) for again in found)
        return found[0]

    def other(y: torch.Tensor, than: torch.Tensor) -> bool:
        return not torch.allclose(y, than, atol=1e-2)

    first = output()
    parameter = next(p for key, p in layer.stored_delta(name).named_parameters() if key in ("step", "values.weight"))
    with torch.no_grad():
        parameter.mul_(4)
    changed = output()
    assert other(changed, first)
    delta = layer.stored_delta(name)
    owner, key = (delta.values, "weight") if part == "input_layernorm" else (delta, "step")
    setattr(owner, key, torch.nn.Parameter(parameter.detach() / 4, requires_grad=False))
    assert torch.equal(output(), first)

    weight = layer.base_layer.weight
    with torch.no_grad():
        layer.base_layer.weight = torch.nn.Parameter(weight + 1)
    assert (part == "input_layernorm") or other(output(), first)
    layer.base_layer.weight = weight
    assert torch.equal(output(), first)

    seen: list[bool] = []
    with layer.base_layer.register_forward_hook(lambda module, *_: seen.append(module.training)):
        output(1)
        layer.train()
        output(1)
        layer.eval()
    assert seen == [False, True]
    assert torch.equal(output(), first)
    assert len(seen) == 2
    base = layer.base_layer
    if part == "input_layernorm":
        base.variance_epsilon, before = 10.0, base.variance_epsilon
        assert other(output(), first)
        base.variance_epsilon = before
        assert torch.equal(output(), first)
    layer.base_layer = copy.deepcopy(base)
    layer.base_layer.weight = weight
    with layer.base_layer.register_forward_hook(lambda module, *_: seen.append(module.training)):
        output(1)
    assert len(seen) == 3
    layer.base_layer = base

    model.set_expert("code" if name == "math" else "math")
    assert other(output(), first)
    with model._meswitch_switch.rows([name, name]):
        assert torch.equal(output(), first)
    with model._meswitch_switch.rows([name, None]):
        assert torch.allclose(output()[0], first[0], atol=1e-5 if model.dtype == torch.float32 else 1e-2)
        assert torch.allclose(output()[1], layer.base_layer(x)[1], atol=1e-5 if model.dtype == torch.float32 else 1e-2)
    model.set_expert(name)
    assert torch.equal(output(), first)
    model.disable_adapters()
    assert torch.equal(output(), layer.base_layer(x))
    model.enable_adapters()
    assert torch.equal(output(), first)


@pytest.mark.parametrize("part", ["input_layernorm", "mlp.up_proj"])
def test_compiled_layers_follow_the_choice(model: Any, part: str) -> None:
    layer: Any = model.model.layers[0].get_submodule(part)
    x = torch.randn(2, 3, 64, dtype=model.dtype)
    compiled = torch.compile(layer, backend="eager")
    close = {"atol": 1e-5} if model.dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    before = None
    for name in ("math", "code", None, "math"):
        model.set_expert(name)
        with torch.no_grad():
            expected = [layer(x) for _ in range(2)][1]
            for _ in range(2):
                assert torch.allclose(compiled(x), expected, **close)
                layer(x)
        assert before is None or not torch.allclose(before, expected, **close)
        before = expected


def test_an_expert_loaded_in_the_place_of_another_is_seen(model: Any, tiny_family: TinyFamily) -> None:
    """Also where a call that had begun before keeps what belongs to the one that is gone."""
    model.set_expert("math")
    before = logits(model)
    layers: list[Any] = [
        layer for layer in model.modules() if getattr(layer, "_last", None) or hasattr(layer, "_dense")
    ]
    caches = [layer._dense.__dict__.copy() if hasattr(layer, "_dense") else layer._last for layer in layers]
    model.delete_adapter("math")
    model.load_adapter(tiny_family.deltas["code"], adapter_name="math")
    for layer, cache in zip(layers, caches, strict=True):
        if hasattr(layer, "_dense"):
            layer._dense.__dict__.update(cache)
        else:
            layer._last = cache
    model.set_expert("math")
    found = [logits(model) for _ in range(2)]
    model.set_expert("code")
    assert all(torch.equal(logits(model), other) for other in found)
    assert not torch.allclose(found[0][..., :64], before[..., :64], atol=1e-2)


def test_a_watched_base_sees_the_whole_batch_once(model: Any) -> None:
    seen: list[torch.Size] = []
    layer: Any = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 2, 64, dtype=model.dtype)
    with torch.no_grad(), model._meswitch_switch.rows(["math", "code", None]):
        expected = layer(x)
        with layer.base_layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape)):
            found = [layer(x) for _ in range(2)]
    assert seen == [x.shape] * 2
    assert all(torch.allclose(y, expected, atol=1e-5 if model.dtype == torch.float32 else 0.1) for y in found)


def test_double_precision_is_kept() -> None:
    layer = LinearLayer(torch.nn.Linear(64, 32, bias=False, dtype=torch.float64), ExpertSwitch(base_vocab_size=8))
    layer.switch.enter("a", ExpertInfo(vocab_size=8))
    layer.add_delta("a", LinearRecord(32, 64, 2))
    delta = layer.stored_delta("a")
    delta.assign("codes", torch.randint(0, 256, (32, 16), dtype=torch.uint8), torch.device("cpu"))
    delta.assign("step", torch.rand(32), torch.device("cpu"))
    layer.switch.set_active(["a"])
    x = torch.randn(2, 1, 64, dtype=torch.float64)
    expected = x @ (layer.base_layer.weight + delta.weight(torch.float64)).T
    with torch.no_grad():
        assert all(torch.allclose(layer(x), expected, rtol=0, atol=1e-12) for _ in range(2))
