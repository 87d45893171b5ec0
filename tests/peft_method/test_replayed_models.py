"""Whole models that are compiled or captured once, and then answer as whichever expert is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, StaticCache

from tests.fixtures_models import CODE_VOCAB_SIZE, VOCAB_SIZE, TinyFamily, dense_model, llama_config
from tests.models.architectures import VOCABULARY, build
from tests.peft_method.test_kernel_path import DEVICE, INTERPRETED, LAYERS, needs_kernels, tiny_family
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, calls, compress
from transformers_meswitch.errors import UnsupportedOperationError
from transformers_meswitch.peft_method import kernel_path, rows_layers, switch, values_layer

__all__ = ["tiny_family"]

Choice = list[str | None]
#: Of the largest logit.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def load(family: TinyFamily, *names: str) -> Any:
    deltas = {name: family.deltas[name] for name in names}
    return MESwitchModelForCausalLM.from_pretrained(
        family.base, experts=deltas, dtype=torch.float32, device_map=DEVICE
    ).eval()


@pytest.fixture(scope="module")
def dense(tiny_family: TinyFamily) -> dict[str | None, Any]:
    """Stock models of base and experts, worked out from the files."""
    return {None: AutoModelForCausalLM.from_pretrained(tiny_family.base)} | {
        name: dense_model(tiny_family.base, delta) for name, delta in tiny_family.deltas.items()
    }


def check(logits: torch.Tensor, dense: dict[str | None, Any], names: Choice, ids: torch.Tensor) -> None:
    """Logits ``[batch, tokens, width]`` are those of each row's dense model, ``-inf`` beyond its vocabulary."""
    for row, name in enumerate(names):
        expected = dense[name](ids[row : row + 1]).logits[0, -logits.shape[1] :]
        expected = F.pad(expected, (0, logits.shape[-1] - expected.shape[-1]), value=float("-inf"))
        ours = logits[row].cpu()
        assert torch.equal(ours.isneginf(), expected.isneginf())
        known = expected.isfinite()
        assert (ours - expected)[known].abs().max() <= TOLERANCE * expected[known].abs().max()


#: Ids that all experts know, one of which both changed, int64 ``[2, 1]``.
IDS = torch.tensor([[40], [41]])


@needs_kernels
def test_a_model_is_compiled_once_for_all_experts(tiny_family: TinyFamily, dense: Any) -> None:
    model = load(tiny_family, "math", "code")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = IDS.to(DEVICE)
    compiled(ids)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("math", "code", None):
            model.set_expert(name)
            check(compiled(ids).logits, dense, [name] * 2, IDS)
        for names in (["math", None], ["code", "math"]):
            with model._meswitch_switch.rows(names):
                check(compiled(ids).logits, dense, names, IDS)
        model.set_expert("code")
        added = torch.tensor([[CODE_VOCAB_SIZE - 1], [7]])
        check(compiled(added.to(DEVICE)).logits, dense, ["code"] * 2, added)
        model.disable_adapters()
        check(compiled(ids).logits, dense, [None] * 2, IDS)
        model.enable_adapters()
        model.delete_adapter("code")
        # As wide as it was compiled, though nobody knows the last ids now.
        check(compiled(ids).logits, dense, ["math"] * 2, IDS)
        model.load_adapter(tiny_family.deltas["code"], adapter_name="again")
        check(compiled(ids).logits, dense, ["code"] * 2, IDS)
        with pytest.raises(AssertionError):
            check(compiled(ids).logits, dense, ["math"] * 2, IDS)


@needs_kernels
def test_compiled_code_works_out_once_what_layers_share(tiny_family: TinyFamily) -> None:
    model = load(tiny_family, "math", "code")
    asked: list[str] = []

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        asked.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch.compile(model, fullgraph=True, backend=count)(IDS.to(DEVICE))
    times = [sum(name in target for target in asked) for name in ("group_rows", "fused_linears", "head_rows")]
    # The rows by expert; queries, keys and values in one launch, outputs, gate and up in one, down.
    assert times == [1, 4 * LAYERS, 1]


@needs_kernels
def test_a_larger_vocabulary_is_compiled_again(tiny_family: TinyFamily, dense: Any) -> None:
    model = load(tiny_family, "math")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.set_expert("math")
    assert compiled(IDS.to(DEVICE)).logits.shape[-1] == VOCAB_SIZE
    model.load_adapter(tiny_family.deltas["code"], adapter_name="code")
    logits = compiled(IDS.to(DEVICE)).logits
    assert logits.shape[-1] == CODE_VOCAB_SIZE
    check(logits, dense, ["code"] * 2, IDS)


def one_and_two(
    folder: Path, base: Any, changed: Callable[[str, Any], list[torch.nn.Parameter]]
) -> tuple[Any, dict[str | None, Any], dict[str, Path]]:
    """A model with experts ``one`` and ``two`` of a base, their dense models, and their deltas.

    Of an expert the parameters that ``changed`` returns differ from the base's.
    """
    base.save_pretrained(folder / "base")
    dense: dict[str | None, Any] = {None: AutoModelForCausalLM.from_pretrained(folder / "base")}
    deltas = {}
    how = MESwitchConfig(bits=4, salient_channels=3)
    for seed, name in enumerate(("one", "two")):
        expert = AutoModelForCausalLM.from_pretrained(folder / "base")
        generator = torch.Generator().manual_seed(seed)
        for parameter in changed(name, expert):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        expert.save_pretrained(folder / name)
        out = folder / f"{name}-delta"
        deltas[name] = compress(folder / "base", folder / name, out, how, calibration=None, progress=False)
        dense[name] = dense_model(folder / "base", deltas[name])
    model = MESwitchModelForCausalLM.from_pretrained(
        folder / "base", experts=deltas, dtype=torch.float32, device_map=DEVICE
    )
    return model.eval(), dense, deltas


@needs_kernels
@pytest.mark.parametrize("model_type", ["gemma2", pytest.param("gpt2", marks=SLOW)])
def test_capped_logits_and_learned_positions(model_type: str, tmp_path: Path) -> None:
    def grow(name: str, expert: Any) -> list[torch.nn.Parameter]:
        expert.resize_token_embeddings(VOCABULARY + (3 if name == "two" else 0), mean_resizing=False)
        return list(expert.parameters())

    base = build(model_type, tied=True, num_hidden_layers=1)
    model, dense, _ = one_and_two(tmp_path, base, grow)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.tensor([[5, 6], [7, 8]])
    compiled(ids.to(DEVICE))
    with torch._dynamo.config.patch(error_on_recompile=True):
        names = ["one", "two"]
        with model._meswitch_switch.rows(names):
            check(compiled(ids.to(DEVICE)).logits, dense, names, ids)


@needs_kernels
def test_a_compiled_forward_and_norms_changed_in_part(tmp_path: Path) -> None:
    """The forward alone is compiled, so the rows of the call are seen around it; biases of norms are the base's."""
    base = build("gpt2", tied=True, num_hidden_layers=1)
    for name, parameter in base.named_parameters():
        if ".ln_" in name and name.endswith("bias"):
            parameter += 1.0

    def changed(name: str, expert: Any) -> list[torch.nn.Parameter]:
        everything = expert.named_parameters()
        return [p for key, p in everything if not (name == "one" and ".ln_" in key and key.endswith("bias"))]

    model, dense, deltas = one_and_two(tmp_path, base, changed)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    ids = torch.tensor([[5, 6], [7, 8]])
    for names in (["one", "two"], ["two", None], ["one", "one"]):
        with model._meswitch_switch.rows(names):
            check(model(ids.to(DEVICE)).logits, dense, names, ids)
    # Who takes the place of another has nothing of it.
    for name in ("two", "one"):
        model.delete_adapter(name)
    model.load_adapter(deltas["two"], adapter_name="two")
    model.delete_adapter("two")
    model.load_adapter(deltas["one"], adapter_name="one")
    with model._meswitch_switch.rows(["one", None]):
        check(model(ids.to(DEVICE)).logits, dense, ["one", None], ids)


@needs_kernels
@pytest.mark.parametrize("made", ["model", "expert"])
def test_what_was_loaded_in_inference_mode_can_be_changed(tiny_family: TinyFamily, dense: Any, made: str) -> None:
    with torch.inference_mode(made == "model"):
        model = load(tiny_family, "math")
    with torch.inference_mode():
        model.load_adapter(tiny_family.deltas["code"], adapter_name="code")
    model.set_expert("math")
    model.delete_adapter("code")
    model.load_adapter(tiny_family.deltas["code"], adapter_name="again")
    with torch.inference_mode(), model._meswitch_switch.rows(["again", None]):
        check(model(IDS.to(DEVICE)).logits, dense, ["code", None], IDS)


@needs_kernels
def test_choices_that_would_not_be_followed_are_refused(tiny_family: TinyFamily, monkeypatch: Any) -> None:
    model = load(tiny_family, "math", "code")
    monkeypatch.setattr("transformers_meswitch.calls.is_replayed", lambda: True)
    with pytest.raises(UnsupportedOperationError, match="adapter_names cannot be given to a call that is compiled"):
        model(IDS.to(DEVICE), adapter_names=["math", "code"])


def record(step: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Callable[[], torch.Tensor]:
    """Capture a step in a CUDA graph and return its replay; the interpreter runs it anew as it would be captured."""
    if INTERPRETED:

        def run() -> torch.Tensor:
            with monkeypatch.context() as patched:
                for module in (kernel_path, rows_layers, switch, values_layer, calls):
                    patched.setattr(module, "is_replayed", lambda: True)
                return step()

        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> torch.Tensor:
        logits.fill_(float("nan"))
        graph.replay()
        return logits

    return replay


@pytest.mark.parametrize("device", ["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_captured_decoding_step_answers_as_every_expert(
    device: str, tiny_family: TinyFamily, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_family, "math", "code")
    cache = StaticCache(config=llama_config(num_hidden_layers=LAYERS), max_cache_len=8)
    # Its name differs between releases of transformers.
    name = "cache" if "cache" in inspect.signature(type(model.model).forward).parameters else "past_key_values"
    token = torch.zeros(2, 1, dtype=torch.int64, device=device)
    prompt = torch.tensor([[5], [9]])

    def start(names: Choice, last: torch.Tensor) -> None:
        cache.reset()
        with model._meswitch_switch.rows(names):
            model(prompt.to(device), **{name: cache})
        token.copy_(last)

    # A choice in which the base answers a row launches every kernel that there is.
    start(["math", None], IDS)
    with model._meswitch_switch.rows(["math", None]):
        replay = record(lambda: model(token, **{name: cache}).logits, monkeypatch)
    for names in (["code", "math"], [None, "code"]):
        start(names, IDS)
        with model._meswitch_switch.rows(names):
            check(replay(), dense, names, torch.cat([prompt, IDS], 1))
    model.delete_adapter("code")
    model.load_adapter(tiny_family.deltas["code"], adapter_name="again")
    start(["again", "again"], IDS)
    check(replay(), dense, ["code", "code"], torch.cat([prompt, IDS], 1))
    live = model._meswitch_switch.live_on(torch.device(device))
    assert live.worked_out is None
    if INTERPRETED:
        monkeypatch.setattr(model.model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record(lambda: model(token, **{name: cache}).logits, monkeypatch)()
        assert live.worked_out is None


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="runs the tests above")
def test_in_the_interpreter(slow: bool) -> None:
    check_interpreted(
        __file__,
        test_a_model_is_compiled_once_for_all_experts,
        test_compiled_code_works_out_once_what_layers_share,
        test_a_larger_vocabulary_is_compiled_again,
        test_capped_logits_and_learned_positions,
        test_a_compiled_forward_and_norms_changed_in_part,
        test_what_was_loaded_in_inference_mode_can_be_changed,
        test_choices_that_would_not_be_followed_are_refused,
        test_a_captured_decoding_step_answers_as_every_expert,
        slow=slow,
    )
