"""Early layers as CUDA graphs; on a CPU with computations that are run anew in the place of graphs."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, inject_adapter_in_model

from tests.fixtures_models import TinyFamily
from transformers_meswitch import HeadRouter, MESwitchModelForCausalLM
from transformers_meswitch.errors import RouterError, UnsupportedModelError, UnsupportedOperationError
from transformers_meswitch.peft_method.live_choice import as_chosen, is_replayed
from transformers_meswitch.routing import early_graphs, head
from transformers_meswitch.routing.early_graphs import capture, replayed
from transformers_meswitch.routing.hidden_states import pooled_hidden_states

LENGTHS = (1, 2, 63, 64, 65, 99, 100)
WINDOW = 100


def rows(seed: int = 0) -> list[list[int]]:
    """One of each length."""
    tokens = random.Random(seed)
    return [[tokens.randrange(5, 120) for _ in range(length)] for length in LENGTHS]


def load(family: TinyFamily, *names: str, **arguments: Any) -> Any:
    deltas = {name: family.deltas[name] for name in names or family.deltas}
    return MESwitchModelForCausalLM.from_pretrained(family.base, experts=deltas, **arguments).eval()


def eager(model: Any, row: list[int]) -> torch.Tensor:
    with model._meswitch_switch.rows([None]):
        return pooled_hidden_states(model, [row], [1])


def again(run: Callable[[], torch.Tensor], _: Any) -> tuple[torch.Tensor, Callable[[], Any]]:
    """Stands for what records a graph: a replay runs the computation anew, with the choice of when it was recorded."""
    pooled = run()
    return pooled, lambda: pooled.copy_(run())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_graphs, "_DEVICE", "cpu")
    monkeypatch.setattr(early_graphs, "_Memory", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(early_graphs, "_recorded", again)


@pytest.mark.usefixtures("recorded")
def test_a_replay_is_what_the_layers_say(tiny_family: TinyFamily) -> None:
    model = load(tiny_family)
    capture(model, 1, WINDOW)
    with model._meswitch_switch.rows([None]):
        for row in [*rows(), *reversed(rows(1))]:  # shorter after longer: nothing of a row is left for the next
            torch.testing.assert_close(replayed(model, row, 1), eager(model, row), atol=1e-5, rtol=1e-5)
        assert replayed(model, [5] * (WINDOW + 1), 1) is None
        assert replayed(model, [5], 0) is None
    found = early_graphs._CAPTURED[model][1].graphs
    assert list(found) == [64, WINDOW]


@pytest.mark.usefixtures("recorded")
def test_no_graph_is_longer_than_the_base_has_positions(tiny_family: TinyFamily) -> None:
    model = load(tiny_family)
    capture(model, 1, 4096)
    assert list(early_graphs._CAPTURED[model][1].graphs) == [64, 128, 192, 256]


@pytest.mark.usefixtures("recorded")
def test_a_router_replays_prompts_that_come_alone(family: Any, router: HeadRouter, monkeypatch: Any) -> None:
    prompts = ["mira 2024-03-09 4170", "mira 2024-03-09 7"]
    expected = [family.route(prompt).probabilities for prompt in prompts]
    together = family.route(prompts).probabilities
    router.capture(family)
    family.set_expert("letter")
    with monkeypatch.context() as patch:
        patch.setattr(head, "pooled_hidden_states", lambda *_: 1 / 0)
        for prompt, probabilities in zip(prompts, expected, strict=True):
            torch.testing.assert_close(family.route(prompt).probabilities, probabilities, atol=1e-4, rtol=1e-4)
        with pytest.raises(ZeroDivisionError):
            family.route(prompts)
    assert torch.equal(family.route(prompts).probabilities, together)


@contextmanager
def hooked(model: Any) -> Iterator[None]:
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def accelerated(model: Any) -> Iterator[None]:
    add_hook_to_module(model.model.embed_tokens, ModelHook())
    yield
    remove_hook_from_module(model.model.embed_tokens)
    del model.model.embed_tokens.forward  # which accelerate leaves as its own


@contextmanager
def training(model: Any) -> Iterator[None]:
    model.train()
    yield
    model.eval()


def autocast(_: Any) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("change", [hooked, accelerated, training, autocast])
def test_what_a_replay_would_pass_over_is_not_replayed(tiny_family: TinyFamily, change: Any) -> None:
    model = load(tiny_family)
    capture(model, 1, WINDOW)
    with model._meswitch_switch.rows([None]):
        with change(model):
            assert replayed(model, [5, 6], 1) is None
            with pytest.raises(UnsupportedOperationError, match="Routing works without"):
                capture(model, 1, WINDOW)
        assert replayed(model, [5, 6], 1) is not None


def replace_layers(model: Any) -> None:
    model.model.layers = copy.deepcopy(model.model.layers)


def replace_a_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.GELU().eval()


def replace_a_weight(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.base_layer.weight
    model.model.layers[0].self_attn.q_proj.base_layer.weight = torch.nn.Parameter(weight.clone() * 2)


def move_a_weight(model: Any) -> None:
    weight = model.model.embed_tokens.base_layer.weight
    weight.data = weight.data.flip(0)


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("change", [replace_layers, replace_a_module, replace_a_weight, move_a_weight, cast])
def test_another_base_is_not_replayed_until_it_is_captured(tiny_family: TinyFamily, change: Any) -> None:
    model = load(tiny_family)
    capture(model, 1, WINDOW)
    before = eager(model, [5, 6])
    change(model)
    with model._meswitch_switch.rows([None]):
        assert replayed(model, [5, 6], 1) is None
        assert not torch.allclose(eager(model, [5, 6]), before) or change is replace_layers
        capture(model, 1, WINDOW)
        torch.testing.assert_close(replayed(model, [5, 6], 1), eager(model, [5, 6]), atol=1e-2, rtol=1e-2)


@pytest.mark.usefixtures("recorded")
def test_a_module_that_is_gone_and_a_weight_cast_where_it_is_are_noticed(tiny_family: TinyFamily) -> None:
    model = load(tiny_family)
    mlp, linear = model.model.layers[0].mlp, model.model.layers[0].mlp.up_proj.base_layer
    capture(model, 1, WINDOW)
    data = linear.weight.data
    with model._meswitch_switch.rows([None]):
        linear.weight.data = data.view(torch.float16)  # at the same address
        assert replayed(model, [5, 6], 1) is None
        linear.weight.data = data
        assert replayed(model, [5, 6], 1) is not None
        del mlp.act_fn
        gc.collect()
        mlp.act_fn = torch.nn.GELU().eval()  # which may be where the other was
        assert replayed(model, [5, 6], 1) is None


@pytest.mark.usefixtures("recorded")
def test_experts_come_and_go(tiny_family: TinyFamily) -> None:
    model = load(tiny_family, "math")
    capture(model, 1, WINDOW)
    expected = eager(model, [5, 6])
    model.load_adapter(tiny_family.deltas["code"], "code")
    model.set_expert("code")
    model.delete_adapter("math")
    with model._meswitch_switch.rows([None]):
        torch.testing.assert_close(replayed(model, [5, 6], 1), expected, atol=1e-5, rtol=1e-5)


class Elsewhere(torch.nn.Parameter):
    """As the parameters of quantised linears are: a tensor whose data nobody finds by its pointer."""


@pytest.mark.usefixtures("recorded")
def test_other_tensors_and_other_adapters_are_refused(tiny_family: TinyFamily) -> None:
    model = load(tiny_family)
    linear = model.model.layers[0].mlp.up_proj.base_layer
    linear.weight = Elsewhere(linear.weight.data)
    with pytest.raises(UnsupportedOperationError, match="quantised"):
        capture(model, 1, WINDOW)
    model = load(tiny_family)
    adapted = inject_adapter_in_model(LoraConfig(target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(64, 128)))
    model.model.layers[0].mlp.gate_proj = adapted[0]
    with pytest.raises(UnsupportedOperationError, match="other adapters than experts"):
        capture(model, 1, WINDOW)
    assert replayed(model, [5], 1) is None


@pytest.mark.usefixtures("recorded")
def test_what_cannot_be_captured_is_said(tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_family)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(early_graphs, "_recorded", refuse)
    with pytest.raises(UnsupportedModelError, match=r"first 1 layers .* not permitted"):
        capture(model, 1, WINDOW)
    assert replayed(model, [5], 1) is None
    model.merge_adapter(["code"])
    with pytest.raises(UnsupportedOperationError, match="merged"):
        capture(model, 1, WINDOW)


def test_a_cpu_has_no_graphs(family: Any, router: HeadRouter) -> None:
    with pytest.raises(UnsupportedOperationError, match="on a GPU only"):
        router.capture(family)
    with pytest.raises(UnsupportedModelError, match="layer 99"):
        capture(family, 99, WINDOW)


def test_a_router_of_another_base_captures_nothing(tiny_family: TinyFamily, router: HeadRouter) -> None:
    with pytest.raises(RouterError, match="hidden size"):
        router.capture(load(tiny_family))


def test_what_is_captured_as_chosen_does_not_follow_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_replayed()
    with as_chosen():
        assert not is_replayed()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(is_replayed).result()  # another thread's captures do
    assert is_replayed()


# -- on a GPU --------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.gpu


@on_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_a_graph_is_the_base_whatever_expert_is_active(
    tiny_family: TinyFamily, dtype: torch.dtype, tolerance: float
) -> None:
    model = load(tiny_family, dtype=dtype, device_map="cuda")
    expected = [eager(model, row) for row in rows()]
    model.set_expert("code")
    capture(model, 1, WINDOW)
    for name in ("code", "math", None):
        model.set_expert(name)
        with model._meswitch_switch.rows([None]):
            found = [replayed(model, row, 1) for row in rows()]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
        assert not torch.allclose(found[2], expected[3], atol=2 * tolerance)
    # In another thread's block an expert answers, and the graph is the base's all the same.
    with model._meswitch_switch.rows(["math"]):
        assert torch.equal(replayed(model, rows()[3], 1), found[3])
    active = pooled_hidden_states(model, [rows()[3]], [1])
    model.set_expert("code")
    assert not torch.allclose(pooled_hidden_states(model, [rows()[3]], [1]), active, atol=tolerance)


@on_gpu
def test_nothing_of_a_row_is_left_for_the_next(tiny_family: TinyFamily) -> None:
    model = load(tiny_family, device_map="cuda")
    capture(model, 1, WINDOW)
    first = [replayed(model, row, 1) for row in rows()]
    for row in rows(1):
        replayed(model, row, 1)
    for row, expected in reversed(list(zip(rows(), first, strict=True))):
        assert torch.equal(replayed(model, row, 1), expected)


@on_gpu
def test_weights_that_are_written_to_are_followed_and_moved_ones_noticed(tiny_family: TinyFamily) -> None:
    model = load(tiny_family, device_map="cuda")
    capture(model, 1, WINDOW)
    before = replayed(model, [5, 6, 7], 1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.base_layer.weight.mul_(-1)
    found = replayed(model, [5, 6, 7], 1)
    assert not torch.allclose(found, before, atol=1e-2)
    torch.testing.assert_close(found, eager(model, [5, 6, 7]), atol=1e-4, rtol=1e-4)
    model.to("cpu")
    filled = torch.full((1 << 24,), float("nan"), device="cuda")  # where the weights were
    assert replayed(model, [5, 6, 7], 1) is None
    model.to("cuda")
    del filled
    torch.testing.assert_close(eager(model, [5, 6, 7]), found, atol=1e-4, rtol=1e-4)
    capture(model, 1, WINDOW)
    torch.testing.assert_close(replayed(model, [5, 6, 7], 1), found, atol=1e-4, rtol=1e-4)


@on_gpu
def test_threads_route_while_others_generate(tiny_family: TinyFamily) -> None:
    model = load(tiny_family, device_map="cuda")
    capture(model, 1, WINDOW)
    expected = {i: replayed(model, row, 1) for i, row in enumerate(rows())}
    ids = torch.tensor([[5, 6, 7], [40, 41, 42]], device="cuda")
    written = model.generate(ids, expert=["math", "code"], max_new_tokens=8, do_sample=False)

    def route(seed: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()) if seed % 2 else nullcontext():
            numbers = [random.Random(seed + i).randrange(len(LENGTHS)) for i in range(40)]
            return all(torch.equal(replayed(model, rows()[i], 1), expected[i]) for i in numbers)

    def generate() -> bool:
        found = model.generate(ids, expert=["math", "code"], max_new_tokens=8, do_sample=False)
        model.generate(ids, expert=["math", "code"], max_new_tokens=4, do_sample=True)
        return torch.equal(found, written)

    with ThreadPoolExecutor(5) as pool:
        done = [pool.submit(route, seed) for seed in range(4)] + [pool.submit(generate) for _ in range(3)]
        assert all(one.result() for one in done)


@on_gpu
def test_a_model_that_was_captured_is_freed(tiny_family: TinyFamily) -> None:
    model = load(tiny_family, device_map="cuda")
    capture(model, 1, WINDOW)
    found = weakref.ref(model)
    del model
    gc.collect()
    assert found() is None


@on_gpu
def test_a_quantised_base_is_refused(tiny_family: TinyFamily) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = load(tiny_family, dtype=torch.bfloat16, device_map="cuda", quantization_config=settings)
    with pytest.raises(UnsupportedOperationError, match="quantised"):
        capture(model, 1, WINDOW)


def test_inference_mode_is_refused(tiny_family: TinyFamily) -> None:
    model = load(tiny_family)
    with torch.inference_mode(), pytest.raises(UnsupportedOperationError, match="inference_mode"):
        capture(model, 1, WINDOW)


@on_gpu
def test_weights_made_in_inference_mode_are_refused(tiny_family: TinyFamily) -> None:
    with torch.inference_mode():
        model = load(tiny_family, device_map="cuda")
    with pytest.raises(UnsupportedOperationError, match="inference mode"):
        capture(model, 1, WINDOW)
