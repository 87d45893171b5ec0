"""Norms of mixed batches against float64 and models' own modules: in the interpreter, on a GPU, by the reference."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import StaticCache
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import meswitch_kernels
from meswitch_kernels import NormForm, norm_rows, norm_rows_reference
from tests.fixtures_models import TinyFamily, llama_config
from tests.kernels.test_delta_linear import DEVICES, INTERPRETED, ROUNDING, poisoned_memory
from tests.peft_method.test_replayed_models import record
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.peft_method import values_stack
from transformers_meswitch.peft_method.injection import wrapped_layers
from transformers_meswitch.peft_method.values_layer import ValuesLayer
from transformers_meswitch.peft_method.values_stack import NormKind, ValuesStack, norm_kind

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS: tuple[NormForm, ...] = get_args(NormForm)
WIDTHS = [1, 7, 576, 4096, 5120]
EPS = 1e-5
#: Slots with a weight in them; what is in the others must not be seen.
HAS = [True, True, False, True]
BATCHES = [[-1], [3], [2], [1, 1, 1], [0, -1, 3, 2, 1, -1, 0]]
MODULES: dict[NormForm, Any] = {"round_first": LlamaRMSNorm, "round_last": GptOssRMSNorm, "plus_one": GemmaRMSNorm}


def norm_inputs(
    index: list[int], shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Rows of very different sizes, and what else the operator takes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(index), *shape, generator=generator)
    size = torch.tensor([0.003, 1.0, 40.0])[torch.randint(3, x.shape[:-1], generator=generator)]
    weight = torch.randn(shape[-1], generator=generator)
    own_weights = torch.randn(len(HAS), shape[-1], generator=generator)
    has = torch.tensor(HAS)
    own_weights[~has] = float("nan")
    floats = [tensor.to(device, dtype) for tensor in (x * size[..., None], weight, own_weights)]
    return *floats, has.to(device), torch.tensor(index, dtype=torch.int32, device=device)


def weight_of(row: int, inputs: tuple[torch.Tensor, ...], index: list[int]) -> torch.Tensor:
    return inputs[2][index[row]] if index[row] >= 0 and HAS[index[row]] else inputs[1]


def check_sizes(found: torch.Tensor, inputs: tuple[torch.Tensor, ...], index: list[int], form: NormForm) -> None:
    """Every element, by sums in float64, within what it is rounded by, once or twice."""
    x = inputs[0]
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    steps = (2 if form == "round_first" else 1) * (2 if INTERPRETED and x.dtype == torch.bfloat16 else 1)
    for row in range(len(index)):
        values, weight = x[row].cpu().double(), weight_of(row, inputs, index).cpu().double()
        values = values / (values.square().mean(-1, keepdim=True) + EPS).sqrt()
        expected = values * (1 + weight if form == "plus_one" else weight)
        # One added to a weight of nearly minus one is exact in float32, but not what float32 has made of it before.
        allowed = steps * (1.01 * ROUNDING[x.dtype] + 1e-6) * expected.abs() + 1e-6 * values.abs() + 1e-7
        error = (found[row].cpu().double() - expected).abs()
        assert (error <= allowed).all(), (error / allowed).max()


def check_modules(found: torch.Tensor, inputs: tuple[torch.Tensor, ...], index: list[int], module: nn.Module) -> None:
    """As the module with each row's weight, nearly everywhere to the bit where a dtype is coarser than sums' order."""
    x = inputs[0]
    module = module.to(x.device, x.dtype)
    with torch.no_grad():
        rows = [
            functional_call(module, {"weight": weight_of(row, inputs, index)}, (x[row : row + 1],))
            for row in range(len(index))
        ]
    expected = torch.cat(rows)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found, expected, rtol=5 * ROUNDING[x.dtype] + 1e-5, atol=1e-6)
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not INTERPRETED):
        assert (found == expected).float().mean() > 0.99


def run(inputs: tuple[torch.Tensor, ...], form: NormForm) -> torch.Tensor:
    with poisoned_memory():
        return norm_rows(*inputs, eps=EPS, form=form)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=SLOW)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: NormForm, dtype: torch.dtype, device: str) -> None:
    for width in WIDTHS:
        for index in BATCHES if width == 576 else BATCHES[-1:]:
            inputs = norm_inputs(index, (2, width), dtype, device, seed=width)
            found = run(inputs, form)
            check_sizes(found, inputs, index, form)
            check_modules(found, inputs, index, MODULES[form](width, eps=EPS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (2, 1, 2, 9)], ids=str)
def test_shapes(shape: tuple[int, ...], device: str) -> None:
    """A norm of heads' queries or keys among them, and tensors that lie otherwise in memory."""
    index = BATCHES[-1]
    inputs = norm_inputs(index, shape, torch.float16, device)
    check_modules(run(inputs, "round_first"), inputs, index, LlamaRMSNorm(shape[-1], eps=EPS))
    if len(shape) == 3:
        apart = (inputs[0].transpose(1, 2), *inputs[1:])
        check_modules(run(apart, "round_first"), apart, index, LlamaRMSNorm(shape[-1], eps=EPS))
        # At addresses that are multiples of no more than their elements' size.
        odd = [F.pad(tensor.flatten(), (1, 0))[1:].view(tensor.shape) for tensor in inputs]
        assert all(tensor.data_ptr() % 16 for tensor in odd)
        assert torch.equal(run(tuple(odd), "round_first"), run(inputs, "round_first"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_torch(dtype: torch.dtype, device: str) -> None:
    for width in (7, 576):
        index = BATCHES[-1]
        inputs = norm_inputs(index, (3, width), dtype, device)
        check_modules(run(inputs, "round_last"), inputs, index, nn.RMSNorm(width, eps=EPS))


@pytest.mark.parametrize("device", DEVICES)
def test_the_checks_see_what_is_wrong(device: str) -> None:
    index = BATCHES[-1]
    inputs = norm_inputs(index, (2, 576), torch.float16, device)
    for form in FORMS:
        right = run(inputs, form)
        check_sizes(right, inputs, index, form)
        for wrong in FORMS:
            if wrong != form:
                with pytest.raises(AssertionError):
                    check_modules(right, inputs, index, MODULES[wrong](576, eps=EPS))
        for other in ([0, -1, 3, 2, 0, -1, 0], [0, 1, 3, 2, 1, -1, 0], [0, -1, 3, 3, 1, -1, 0]):
            with pytest.raises(AssertionError):
                check_sizes(right, inputs, other, form)
        with pytest.raises(AssertionError):
            check_modules(right, inputs, index, MODULES[form](576, eps=10 * EPS))
        right[-1, -1, -1] = float("nan")
        with pytest.raises(AssertionError):
            check_sizes(right, inputs, index, form)


@pytest.fixture
def model(tiny_family: TinyFamily) -> Any:
    """In bfloat16, which the interpreter, however, truncates to."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    return MESwitchModelForCausalLM.from_pretrained(
        tiny_family.base,
        experts=tiny_family.deltas,
        dtype=dtype,
        device_map="cpu" if INTERPRETED else "cuda",
    ).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[NormForm]:
    """The forms with which the layers call the operator."""
    made: list[NormForm] = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(kwargs["form"])
        return norm_rows(*args, **kwargs)

    monkeypatch.setattr(values_stack, "norm_rows", watched)
    return made


def norm_layers(model: Any) -> list[ValuesLayer]:
    return [layer for layer in wrapped_layers(model).values() if isinstance(layer, ValuesLayer)]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_captured_runs_the_kernel(
    device: str, model: Any, calls: list[NormForm], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = next(found for found in norm_layers(model) if found.delta_of("math") and found.delta_of("code"))
    base = layer.get_base_layer()
    x = torch.randn(2, 3, base.weight.shape[0], generator=torch.Generator().manual_seed(0))
    x = x.to(device, base.weight.dtype)
    rounding = ROUNDING[x.dtype]

    def check(replay: Any) -> None:
        for names in (["math", "code"], ["code", None], [None, None]):
            with model._meswitch_switch.rows(names):
                torch.testing.assert_close(replay(), layer(x), rtol=4 * rounding + 1e-5, atol=1e-6)

    def recorded(x: torch.Tensor) -> Any:
        # Each recording is a call of the model, which works out anew which expert each row has.
        live = model._meswitch_switch.live_on(x.device)
        live.begin()
        try:
            return record(lambda: layer(x), monkeypatch)
        finally:
            live.end()

    calls.clear()
    with torch.no_grad():
        check(recorded(x))
    assert set(calls) == {"round_first"}
    # Where it was not recorded nothing has changed, nor where somebody watches the module, compiles it, wants
    # gradients, or where another dtype is mixed in.
    calls.clear()
    with torch.no_grad(), model._meswitch_switch.rows(["math", "code"]):
        layer(x)
        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend="eager")(x)
        seen: list[torch.Size] = []
        hook = base.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        recorded(x)()
        assert seen
        hook.remove()
        recorded(x.to(torch.float64))()
    base.weight.requires_grad_(True)
    recorded(x)()
    base.weight.requires_grad_(False)
    assert not calls


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter(slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(
        __file__,
        test_forms,
        test_shapes,
        test_norms_of_torch,
        test_the_checks_see_what_is_wrong,
        test_what_is_captured_runs_the_kernel,
        slow=slow,
    )


# What follows needs a GPU.


@pytest.mark.gpu
def test_a_model_that_is_captured_answers_as_every_expert(
    model: Any, calls: list[NormForm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16; tests of replayed models have float32, in the interpreter, too."""
    device, tolerance = "cuda", 3e-2
    cache = StaticCache(config=llama_config(), max_cache_len=8)
    name = "cache" if "cache" in inspect.signature(type(model.model).forward).parameters else "past_key_values"
    token = torch.tensor([[40], [41]], device=device)

    @torch.no_grad()
    def logits(names: list[str | None], step: Any) -> torch.Tensor:
        cache.reset()
        with model._meswitch_switch.rows(names):
            model(torch.tensor([[5], [9]], device=device), **{name: cache})
            return step().float().clone()

    def step() -> torch.Tensor:
        return model(token, **{name: cache}).logits

    calls.clear()
    with torch.no_grad(), model._meswitch_switch.rows(["math", None]):
        model(token, **{name: cache})
        replay = record(step, monkeypatch)
        replay()
    norms = len([layer for layer in norm_layers(model) if layer.stack is not None])
    assert len(calls) % norms == 0
    assert len(calls) >= norms > 0
    for names in (["code", "math"], [None, "code"]):
        expected, found = logits(names, step), logits(names, replay)
        known = expected.isfinite()
        assert torch.equal(found.isfinite(), known)
        largest = expected[known].abs().max()
        assert (found - expected)[known].abs().max() <= tolerance * largest
        wrong = logits(["math", "math"], replay)
        both = known & wrong.isfinite()
        assert (wrong - expected)[both].abs().max() > tolerance * largest


@pytest.mark.gpu
def test_a_graph_sees_other_experts() -> None:
    index = [0, -1, 3, 2]
    inputs = norm_inputs(index, (1, 4096), torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(inputs, "round_first")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # What comes before and after starts and ends beside it.
        found = norm_rows(inputs[0] * 1, *inputs[1:], eps=EPS, form="round_first")
        again = norm_rows(found, *inputs[1:], eps=EPS, form="round_first")
    for chosen in (index, [1, 1, 1, 1], [-1, -1, 0, 3]):
        inputs[-1].copy_(torch.tensor(chosen))
        found.fill_(float("nan"))
        again.fill_(float("nan"))
        graph.replay()
        check_modules(found, inputs, chosen, LlamaRMSNorm(4096, eps=EPS))
        check_modules(again, (found, *inputs[1:]), chosen, LlamaRMSNorm(4096, eps=EPS))


# What follows needs no GPU.


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("round_first", [True, False])
def test_the_kernel_compiles_for_hopper(round_first: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from meswitch_kernels.triton_norm_rows import _norm_rows_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {**dict.fromkeys(("y", "x", "weight", "own_weights"), "*bf16"), "has": "*i1", "slot": "*i32"}
    sizes = {"rows_per_expert": "i32", "width": "i32", "eps": "fp32"}
    constants = {"ROUND_FIRST": round_first, "PLUS_ONE": False, "BLOCK": 4096, "OVERLAP": True}
    names = _norm_rows_kernel.arg_names
    source = ASTSource(
        fn=_norm_rows_kernel,
        signature={name: (types | sizes).get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*types, "width")},
    )
    ptx = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16}).asm["ptx"]
    # The row, both weights and the result, 16 bytes a thread each.
    assert ptx.count("ld.global.v4.b32") == 3
    assert ptx.count("st.global.v4.b32") == 1
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents") < ptx.index("ld.global")


@pytest.mark.skipif(INTERPRETED, reason="of the reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_operator_on_a_cpu_runs_the_reference(form: NormForm, dtype: torch.dtype) -> None:
    for shape in ((30,), (2, 3, 576), (2, 1)):
        inputs = norm_inputs(BATCHES[-1], shape, dtype, "cpu")
        found = run(inputs, form)
        check_sizes(found, inputs, BATCHES[-1], form)
        check_modules(found, inputs, BATCHES[-1], MODULES[form](shape[-1], eps=EPS))
        assert torch.equal(found, norm_rows_reference(*inputs, eps=EPS, form=form))


@pytest.mark.skipif(INTERPRETED, reason="of the operator, not of the kernel")
def test_the_operator_is_well_formed() -> None:
    inputs = norm_inputs([0, -1], (3, 30), torch.float32, "cpu")
    torch.library.opcheck(meswitch_kernels.norm_rows.__globals__["_norm_rows"], (*inputs, EPS, "plus_one"))


@pytest.mark.parametrize("shape", [(0, 4, 30), (2, 0, 30), (2, 3, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x, weight, index = torch.ones(shape), torch.ones(shape[-1]), torch.zeros(shape[0], dtype=torch.int32)
    found = norm_rows(x, weight, weight[None], torch.tensor([True]), index, eps=EPS, form="round_last")
    assert found.shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "llama"}, "form is 'llama', expected one of round_first, round_last, plus_one"),
        ({"x": torch.zeros(4)}, r"x is torch.float32 of shape \(4,\), expected \[batch, ..., width\]"),
        ({"x": torch.zeros(2, 4).double()}, "x is torch.float64"),
        ({"x": torch.zeros(2, 4).half()}, r"weight is torch.float32 of shape \(4,\), expected torch.float16"),
        ({"weight": torch.zeros(3)}, r"weight is torch.float32 of shape \(3,\), .* of shape \(4,\)"),
        ({"own_weights": torch.zeros(2, 3)}, r"own_weights is torch.float32 of shape \(2, 3\), .* \(2, 4\)"),
        ({"own_weights": torch.zeros(0, 4)}, r"own_weights is .* of shape \(0, 4\), expected .* \(1, 4\)"),
        ({"own_weights": torch.zeros(())}, r"own_weights is torch.float32 of shape \(\)"),
        ({"own_weights": torch.zeros(2, 4).bfloat16()}, "own_weights is torch.bfloat16"),
        ({"has": torch.zeros(2)}, r"has is torch.float32 of shape \(2,\), expected torch.bool of shape \(2,\)"),
        ({"has": torch.zeros(3, dtype=torch.bool)}, r"has is torch.bool of shape \(3,\), .* \(2,\)"),
        ({"expert_index": torch.zeros(2)}, "expert_index is torch.float32 of shape .*, expected torch.int32"),
        ({"expert_index": torch.zeros(3, dtype=torch.int32)}, r"expert_index is torch.int32 of shape \(3,\)"),
        ({"has": torch.zeros(2, dtype=torch.bool, device="meta")}, "has is on meta, but x is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(4),
        "own_weights": torch.zeros(2, 4),
        "has": torch.zeros(2, dtype=torch.bool),
        "expert_index": torch.zeros(2, dtype=torch.int32),
        "form": "round_first",
    }
    with pytest.raises(ValueError, match=message):
        norm_rows(**{**arguments, **change}, eps=EPS)  # type: ignore[arg-type]


class Other(nn.Module):
    """A norm as Llama's, but for one thing."""

    def __init__(self, what: str, width: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.what = what
        if what != "no name for epsilon":
            self.eps = 1e-5 if what == "another epsilon" else 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, weight = x.float(), self.weight
        if self.what == "centred":
            values = values - values.mean(-1, keepdim=True)
        mean = values.pow(2).mean(-1, keepdim=True)
        if self.what == "epsilon outside":
            values = values / (mean.sqrt() + 1e-6)
        else:
            values = values * torch.rsqrt(mean + 1e-6)
        if self.what == "weight squared":
            weight = weight * weight
        if self.what == "a row's weight doubled":
            weight = torch.cat([weight[None], weight[None].repeat(values.shape[-2] - 1, 1) * 2])
        if self.what == "not rounded":
            return weight.float() * values
        return weight * values.to(x.dtype)


@pytest.mark.skipif(INTERPRETED, reason="no kernel is run")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_norms_are_recognised(device: str, dtype: torch.dtype) -> None:
    here = torch.ones(1, device=device).device
    for width in (1, 7, 576, 4096):
        for form, kind in MODULES.items():
            # In float32 nothing is rounded before the weight.
            known = "round_first" if dtype == torch.float32 and form == "round_last" else form
            assert norm_kind(kind(width, eps=EPS).to(device, dtype)) == NormKind(known, EPS, dtype, here)
    torch_form = "round_first" if dtype == torch.float32 else "round_last"
    assert norm_kind(nn.RMSNorm(576, eps=EPS).to(device, dtype)) == NormKind(torch_form, EPS, dtype, here)
    default = norm_kind(nn.RMSNorm(576).to(device, dtype))
    assert default is not None
    assert default.form == torch_form


@pytest.mark.skipif(INTERPRETED, reason="no kernel is run")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_modules_are_not_taken_for_norms(dtype: torch.dtype) -> None:
    assert norm_kind(Other("").to(dtype)) == NormKind("round_first", 1e-6, dtype, torch.device("cpu"))
    others = ["centred", "epsilon outside", "another epsilon", "no name for epsilon", "weight squared"]
    others.append("a row's weight doubled")
    for what in [*others, *(["not rounded"] if dtype != torch.float32 else [])]:
        assert norm_kind(Other(what).to(dtype)) is None, what
    several = Other("")
    several.bias = nn.Parameter(torch.zeros(64))
    for module in (nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm((2, 8)), nn.Linear(8, 8)):
        assert norm_kind(module.to(dtype)) is None
    assert norm_kind(nn.Sequential(nn.RMSNorm(8))) is None
    assert norm_kind(nn.Identity()) is None
    assert norm_kind(several) is None
    assert norm_kind(Other("").double()) is None


@pytest.mark.skipif(INTERPRETED, reason="no kernel is run")
def test_a_stack_asks_once_where_it_is(monkeypatch: pytest.MonkeyPatch, calls: list[NormForm]) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(values_stack, "norm_kind", lambda module: asked.append(module))
    base = LlamaRMSNorm(8)
    stack = ValuesStack(base)
    x = torch.zeros(2, 8)
    for _ in range(2):
        stack.ask(base)
        assert not stack.norms(base, x)
    assert asked == [base]
    monkeypatch.setattr(values_stack, "norm_kind", norm_kind)
    stack = ValuesStack(base.requires_grad_(False))
    # Before anything is captured, which would not load the kernel.
    assert calls == ["round_first"]
    assert stack.norms(base, x)
    for other in (x.bfloat16(), x[0], x[:, :1], x.to("meta")):
        assert not stack.norms(base, other)
    # Rounding was tried in float32.
    stack, base = stack.bfloat16(), base.bfloat16()
    assert not stack.norms(base, x.bfloat16())
    stack.ask(base)
    assert stack.norms(base, x.bfloat16())
    assert ValuesStack(base).norms(base, x.bfloat16())
    with torch.autocast("cpu"):
        assert not ValuesStack(base).norms(base, x.bfloat16())
    base.forward = base.forward  # as accelerate does it
    assert not ValuesStack(base).norms(base, x.bfloat16())
