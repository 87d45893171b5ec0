"""Linears of one input that are answered together give what they give apart, and only for that input."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch

from meswitch_kernels import fused_linears
from tests.model_state import prompt
from tests.peft_method.test_kernel_path import DEVICE, INTERPRETED, model, needs_kernels, tiny_family
from tests.triton_interpreter import check_interpreted
from transformers_meswitch.peft_method import joint_linears, kernel_path
from transformers_meswitch.peft_method.injection import wrapped_layers
from transformers_meswitch.peft_method.linear_layer import LinearLayer
from transformers_meswitch.peft_method.live_choice import as_chosen

__all__ = ["model", "tiny_family"]


def siblings(model: Any) -> list[LinearLayer]:
    """Queries, keys and values of the first layer in which they know each other."""
    layers = [one for one in wrapped_layers(model).values() if isinstance(one, LinearLayer) and one.joint is not None]
    return layers[0].joint._layers


def apart(layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
    joint, layer.joint = layer.joint, None
    try:
        return layer(x)
    finally:
        layer.joint = joint


def counted(monkeypatch: Any) -> list[int]:
    """Linears of each launch from here on."""
    launches: list[int] = []
    single = kernel_path.fused_linear
    monkeypatch.setattr(
        joint_linears, "fused_linears", lambda x, w, *rest: launches.append(len(w)) or fused_linears(x, w, *rest)
    )
    monkeypatch.setattr(kernel_path, "fused_linear", lambda *rest: launches.append(1) or single(*rest))
    return launches


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("experts", [["math"], ["math", None, "code"]], ids=str)
def test_a_model_gives_what_it_gives_apart(model: Any, experts: list[str | None], monkeypatch: Any) -> None:
    x = prompt(rows=len(experts))[:, :1].to(DEVICE)
    launches = counted(monkeypatch)
    with model._meswitch_switch.rows(experts):
        together = model(x).logits
        joined, launches[:] = list(launches), []
        monkeypatch.setattr(joint_linears, "joins", lambda *_: False)
        alone = model(x).logits
    assert torch.allclose(together, alone, atol=1e-4)
    assert {2, 3} <= set(joined)
    assert set(launches) == {1}
    assert sum(joined) == len(launches)


@needs_kernels
@torch.no_grad()
def test_an_output_is_of_the_input_that_it_was_asked_for(model: Any, monkeypatch: Any) -> None:
    model.set_expert("code")
    first, second, *_ = siblings(model)
    x = torch.randn(1, 1, first.in_features, device=DEVICE)
    expected = apart(second, x)
    launches = counted(monkeypatch)
    first(x)
    assert torch.allclose(second(x), expected, atol=1e-5)
    assert launches == [len(siblings(model))]

    first(x)
    other = x.clone()
    assert torch.allclose(second(other), expected, atol=1e-5)
    assert len(launches) == 3  # equal, but another tensor

    first(x)
    x.mul_(2)
    assert torch.allclose(second(x), apart(second, other.mul(2)), atol=1e-5)


@needs_kernels
@torch.no_grad()
def test_an_output_is_of_the_expert_that_it_was_asked_for(model: Any) -> None:
    first, second, *_ = siblings(model)
    x = torch.randn(1, 1, first.in_features, device=DEVICE)
    model.set_expert("math")
    first(x)
    model.set_expert("code")
    assert torch.allclose(second(x), apart(second, x), atol=1e-5)


@needs_kernels
@torch.no_grad()
def test_tensors_that_are_loaded_in_between_count(model: Any) -> None:
    model.set_expert("code")
    first, second, *_ = siblings(model)
    x = torch.randn(1, 1, first.in_features, device=DEVICE)
    state = {key: tensor.clone() for key, tensor in second.state_dict().items()}
    first(x)
    second.load_state_dict({key: 2 * one if key == "base_layer.weight" else one for key, one in state.items()})
    assert torch.allclose(second(x), apart(second, x), atol=1e-5)


@needs_kernels
@torch.no_grad()
def test_an_output_that_is_kept_by_mistake_is_noticed(model: Any, monkeypatch: Any) -> None:
    """These checks can fail: an output is taken for that of any input."""
    monkeypatch.setattr(joint_linears._Kept, "are_of", lambda *_: True)
    with pytest.raises(AssertionError):
        test_an_output_is_of_the_input_that_it_was_asked_for(model, monkeypatch)


@needs_kernels
@torch.no_grad()
def test_layers_that_are_not_asked_for_are_left_alone(model: Any, monkeypatch: Any) -> None:
    """As of an attention that keeps another model's keys and values, and multiplies queries alone."""
    model.set_expert("code")
    first, second, *_ = siblings(model)
    launches = counted(monkeypatch)
    xs = [torch.randn(1, 1, first.in_features, device=DEVICE) for _ in range(5)]
    for x in xs:
        first(x)
    several = len(siblings(model))
    assert launches == [several, several, 1, 1, 1]
    assert torch.allclose(second(xs[0]), apart(second, xs[0]), atol=1e-5)
    first.joint.forget()  # as when an expert is loaded
    for layer in siblings(model):
        layer(xs[0])
    assert launches[-1] == several


@needs_kernels
def test_layers_of_other_inputs_do_not_know_each_other(model: Any) -> None:
    layers = siblings(model)
    layers[0].in_features += 1
    joint_linears.link_joint_linears(model)
    assert layers[0].joint is None
    left = layers[1:] if len(layers) > 2 else []
    assert all(layer.joint._layers == left for layer in left)


@pytest.mark.gpu
@torch.no_grad()
def test_an_output_stays_in_its_stream_and_capture(model: Any, monkeypatch: Any) -> None:
    model.set_expert("code")
    first, second, *_ = siblings(model)
    x = torch.randn(1, 1, first.in_features, device="cuda")
    expected = apart(second, x)
    first(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        launches = counted(monkeypatch)
        second(x)
    torch.cuda.synchronize()
    assert launches == [len(siblings(model))]
    first(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), as_chosen():
        y = second(x)
    x.mul_(2)
    graph.replay()
    assert torch.allclose(y, apart(second, x), atol=1e-5)
    assert not torch.allclose(y, expected, atol=1e-5)


@needs_kernels
@torch.no_grad()
def test_compiled_code_has_one_launch_of_one_input(model: Any) -> None:
    model.set_expert("code")
    first, second, *_ = siblings(model)
    live = model._meswitch_switch.live_on(torch.device(DEVICE))
    launches: list[int] = []

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        launches.extend(len(node.args[1]) for node in module.graph.nodes if "fused_linears" in str(node.target))
        return module.forward

    @torch.compile(fullgraph=True, backend=count)
    def run(x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
        live.begin()
        outputs = first(x), second(x), second(other), second(x * 1)
        live.end()
        return outputs

    torch._dynamo.reset()
    x, other = (torch.randn(1, 1, first.in_features, device=DEVICE) for _ in range(2))
    expected = apart(first, x), apart(second, x), apart(second, other), apart(second, x)
    for ours, alone in zip(run(x, other), expected, strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)
    assert launches == [3, 1, 1]
    assert live.worked_out is None


@needs_kernels
@torch.no_grad()
def test_compiled_code_with_breaks_keeps_no_outputs(model: Any) -> None:
    model.set_expert("code")
    live = model._meswitch_switch.live_on(torch.device(DEVICE))
    layers = siblings(model)
    kept: list[int] = []

    @torch.compiler.disable
    def look() -> None:
        kept.append(sum(not isinstance(key, tuple) for key in live._traced or {}))

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        live.begin()
        outputs = [layers[0](x)]
        look()
        outputs += [layer(x) for layer in layers[1:]]
        look()
        live.end()
        return outputs

    torch._dynamo.reset()
    x = torch.randn(1, 1, layers[0].in_features, device=DEVICE)
    expected = [apart(layer, x) for layer in layers]
    for ours, alone in zip(torch.compile(run, backend="eager")(x), expected, strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)
    assert kept == [1, 0]


@needs_kernels
@torch.no_grad()
def test_threads_do_not_get_each_others(model: Any) -> None:
    model.set_expert("code")
    first, second, *_ = siblings(model)
    xs = [torch.randn(1, 1, first.in_features, device=DEVICE) for _ in range(4)]
    expected = [apart(second, x) for x in xs]
    # One at a time, since the interpreter is not for threads.
    barrier, lock, found = threading.Barrier(len(xs), timeout=60), threading.Lock(), {}

    def work(number: int) -> None:
        with torch.no_grad():
            with lock:
                first(xs[number])
            barrier.wait()
            with lock:
                found[number] = second(xs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[number], expected[number], atol=1e-5) for number in range(len(xs)))


@needs_kernels
def test_layers_that_cannot_share_a_launch_are_apart(model: Any, monkeypatch: Any) -> None:
    model.set_expert("code")
    first, second, *_ = siblings(model)
    launches = counted(monkeypatch)
    x = torch.randn(1, 1, first.in_features, device=DEVICE)
    handle = second.base_layer.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        first(x)
    handle.remove()
    with torch.inference_mode():
        first(torch.randn(1, 1, first.in_features, device=DEVICE))
    assert launches == [1, 1]


@needs_kernels
@torch.no_grad()
def test_copies_know_their_own(model: Any) -> None:
    model.set_expert("code")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(siblings(model)[0].joint))):
        layers = twin._layers if isinstance(twin, joint_linears.JointLinears) else siblings(twin)
        assert not {id(layer) for layer in layers} & {id(layer) for layer in siblings(model)}
        assert all(layer.joint._layers == layers for layer in layers)


@needs_kernels
@torch.no_grad()
def test_an_input_is_not_kept_alive(model: Any) -> None:
    model.set_expert("code")
    first = siblings(model)[0]
    x = torch.randn(1, 1, first.in_features, device=DEVICE)
    gone = weakref.ref(x)
    first(x)
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(INTERPRETED, reason="runs the tests above")
def test_in_the_interpreter() -> None:
    check_interpreted(
        __file__,
        test_a_model_gives_what_it_gives_apart,
        test_an_output_is_of_the_input_that_it_was_asked_for,
        test_an_output_is_of_the_expert_that_it_was_asked_for,
        test_tensors_that_are_loaded_in_between_count,
        test_an_output_that_is_kept_by_mistake_is_noticed,
        test_layers_that_are_not_asked_for_are_left_alone,
        test_layers_of_other_inputs_do_not_know_each_other,
        test_compiled_code_has_one_launch_of_one_input,
        test_compiled_code_with_breaks_keeps_no_outputs,
        test_threads_do_not_get_each_others,
        test_layers_that_cannot_share_a_launch_are_apart,
        test_copies_know_their_own,
        test_an_input_is_not_kept_alive,
    )
