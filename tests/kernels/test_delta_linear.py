"""Linear layers of mixed batches against float64, in Triton's interpreter, on a GPU, and by the reference.

On a CPU the kernels run in Triton's interpreter, which has to be chosen before Triton is imported; so one test starts
this file again in a process of its own.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import meswitch_kernels
from meswitch_kernels import DeltaLeaves, delta_linear, delta_linear_reference, fused_linear, group_rows, has_kernel
from meswitch_kernels.configurations import Configuration, Key, configuration
from meswitch_kernels.linear import Numerics
from tests.kernels.random_deltas import DISTRIBUTIONS, Layer, dense_delta, expert_indices, move, random_leaves
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted, slow_when_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
NUMERICS: tuple[Numerics, ...] = ("exact", "int16", "int8")
#: (out, in, salient channels, column steps): single elements, all salient, whole blocks, tails of one and more.
SIZES = [(1, 1, 0, False), (3, 7, 7, True), (16, 1024, 0, True), (17, 1031, 3, True), (18, 2063, 17, False)]
#: Error of a delta's own output, over the root of its sum of squares: six standard deviations of what activations
#: lose. The interpreter truncates to bfloat16 where a GPU rounds; of several rows int16 leaves bfloat16 as it is.
TOLERANCE = {
    "exact": {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2},
    "int16": {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 3e-2},
    "int8": 5e-2,
}
#: Half a unit in the last place of the result; twice that where the interpreter truncates.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def mixed_experts(out: int, width: int, count: int = 16) -> list[DeltaLeaves | None]:
    """Experts of all bits, with and without each option, and an empty slot."""
    made: list[DeltaLeaves | None] = [
        random_leaves(
            out, width, 1 + i % 4, salient=(0, 5, 16, 19)[i // 2 % 4], column_steps=i % 3 == 0, bias=i % 5 == 0, seed=i
        )
        for i in range(count)
    ]
    made[7] = None
    return made


def random_inputs(rows: int, out: int, width: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """Activations ``[rows, in]``, weight ``[out, in]`` and bias ``[out]`` of the base."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, width), (out, width), (out,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return x, weight * 1e-2, bias


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, or of the largest integer, instead of what was there."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(y: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor], numerics: Numerics) -> None:
    """Every element: what rounds the result, what quantised activations lose, nothing more."""
    total, size = expected
    tolerance = TOLERANCE[numerics]
    lost = tolerance[y.dtype] if isinstance(tolerance, dict) else tolerance
    allowed = 2 * ROUNDING[y.dtype] * total.abs() + (lost + 1e-5) * size + 1e-5
    error = (y.cpu().double() - total).abs()
    assert (error <= allowed).all(), (error / allowed).max()


def run_both(
    layer: Layer, index: torch.Tensor, inputs: tuple[torch.Tensor, ...], numerics: Numerics
) -> tuple[torch.Tensor, torch.Tensor]:
    """``delta_linear`` over a base output of its own, and ``fused_linear``, into poisoned memory."""
    x, weight, bias = inputs
    groups = layer.groups(index)
    base_out = F.linear(x, weight)
    with poisoned_memory():
        added = delta_linear(x, base_out, layer.table.rows, groups, out_features=weight.shape[0], numerics=numerics)
        fused = fused_linear(x, weight, bias, layer.table.rows, groups, numerics=numerics)
    return added, fused


def base_of_fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Of one row the sum with the base is rounded once; of more, the base's own output is rounded before."""
    exact = x.cpu().double() @ weight.cpu().double().T + bias.cpu().double()
    return exact if len(x) == 1 else F.linear(x, weight, bias)


def check_both(layer: Layer, index: torch.Tensor, dtype: torch.dtype, numerics: Numerics) -> None:
    inputs = random_inputs(len(index), layer.table.out_features, layer.table.in_features, dtype, layer.device)
    x, weight, bias = inputs
    added, fused = run_both(layer, index, inputs, numerics)
    check(added, layer.expected(x, F.linear(x, weight), index), numerics)
    check(fused, layer.expected(x, base_of_fused(x, weight, bias), index), numerics)


#: What several rows are multiplied by: float32, two bytes or one; and bfloat16, as int16 leaves it.
WAYS: tuple[tuple[Numerics, torch.dtype], ...] = (
    ("exact", torch.float32),
    ("int16", torch.float32),
    ("int8", torch.float32),
    ("int16", torch.bfloat16),
)


def rows_over_experts() -> list[object]:
    """In the interpreter, which is slow, integers only where they are laid out otherwise than for less."""
    cases = []
    for name in (*DISTRIBUTIONS, "many_rows"):
        for numerics, dtype in WAYS:
            quick = name == "many_rows" and (numerics, dtype) in (("int8", torch.float32), ("int16", torch.bfloat16))
            marks = () if quick else SLOW
            cases.append(pytest.param(name, numerics, dtype, marks=marks, id=f"{name}-{numerics}-{dtype}"))
    return cases


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("distribution", "numerics", "dtype"), rows_over_experts())
def test_rows_over_experts(distribution: str, numerics: Numerics, dtype: torch.dtype, device: str) -> None:
    layer = Layer.make(mixed_experts(17, 1100), 17, 1100, device)
    check_both(layer, expert_indices(distribution, 16), dtype, numerics)


def sizes() -> list[object]:
    """In the interpreter, one size in 2 bits and in 3, whose words are regrouped, and a tiny one in the others."""
    cases = []
    for size in SIZES:
        for bits in (1, 2, 3, 4):
            quick = (size[0] == 17 and bits in (2, 3)) or (size[0] == 3 and bits in (1, 4))
            cases.append(pytest.param(size, bits, marks=() if quick else SLOW, id=f"{size}-{bits}"))
    return cases


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("numerics", "dtype"), [way for way in WAYS if way[0] != "int8"])
@pytest.mark.parametrize(("size", "bits"), sizes())
def test_sizes(
    size: tuple[int, int, int, bool], bits: int, numerics: Numerics, dtype: torch.dtype, device: str
) -> None:
    out, width, salient, column_steps = size
    leaves = random_leaves(out, width, bits, salient=salient, column_steps=column_steps, bias=True)
    layer = Layer.make([leaves], out, width, device)
    for rows in (1, 2):
        check_both(layer, torch.zeros(rows, dtype=torch.int32), dtype, numerics)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numerics", [pytest.param("exact", marks=SLOW), pytest.param("int8", marks=SLOW), "int16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, numerics: Numerics, device: str) -> None:
    layer = Layer.make(mixed_experts(18, 1048), 18, 1048, device)
    for index in ([2], [0, 1, 2, 3, 0, 1, 2, 3, -1]):
        check_both(layer, torch.tensor(index), dtype, numerics)


@pytest.mark.parametrize("device", DEVICES)
def test_activations_with_an_outlier(device: str) -> None:
    layer = Layer.make([random_leaves(32, 2048, 2)], 32, 2048, device)
    x = random_inputs(1, 32, 2048, torch.float32, device)[0]
    x[0, 700] = 1000.0
    index = torch.tensor([0])
    expected = layer.expected(x, torch.zeros(1, 32), index)[0]
    for numerics, allowed in (("exact", 1e-5), ("int16", 1e-3), ("int8", 1e-1)):
        y = delta_linear(x, None, layer.table.rows, layer.groups(index), out_features=32, numerics=numerics)
        assert (y.cpu() - expected).norm() / expected.norm() < allowed


@pytest.mark.parametrize("device", DEVICES)
def test_the_check_sees_what_is_wrong(device: str) -> None:
    out, width = 17, 600
    layer = Layer.make(mixed_experts(out, width), out, width, device)
    index = torch.tensor([0, 1, 2, 3, 3])
    inputs = random_inputs(5, out, width, torch.float32, device)
    x, weight, _ = inputs
    base_out = F.linear(x, weight)
    expected = layer.expected(x, base_out, index)
    for wrong in ([0, 1, 2, 3, 2], [0, 1, -1, 3, 3], [4, 1, 2, 3, 3]):
        y, _ = run_both(layer, torch.tensor(wrong), inputs, "int8")
        with pytest.raises(AssertionError):
            check(y, expected, "int8")
    three = layer.experts[2]
    assert three is not None
    three.codes.bitwise_not_()
    y, _ = run_both(layer, index, inputs, "int8")
    with pytest.raises(AssertionError):
        check(y, expected, "int8")


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_that_changes_is_seen_at_once(device: str) -> None:
    out, width = 16, 1024
    layer = Layer.make([random_leaves(out, width, 2), None], out, width, device)
    index = torch.tensor([0, 1])
    inputs = random_inputs(2, out, width, torch.float32, device)
    base = F.linear(*inputs[:2])
    for leaves in (None, random_leaves(out, width, 3, salient=2, seed=5), random_leaves(out, width, 4, bias=True)):
        if leaves is None:
            layer.table.clear(1)
        else:
            placed = move(leaves, device)
            layer.table.set(1, placed)
            layer.experts[1] = placed
        check(run_both(layer, index, inputs, "exact")[0], layer.expected(inputs[0], base, index), "exact")


@slow_when_interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_runs_give_the_same_bits(numerics: Numerics, device: str) -> None:
    layer = Layer.make(mixed_experts(17, 1100), 17, 1100, device)
    index = expert_indices("zipf", 16)[:6]
    inputs = random_inputs(6, 17, 1100, torch.bfloat16, device)
    first = run_both(layer, index, inputs, numerics)
    for _ in range(1 if INTERPRETED else 5):
        again = run_both(layer, index, inputs, numerics)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sharers", "numerics", "dtype"),
    [
        pytest.param(1, "int8", torch.float32, marks=SLOW),
        pytest.param(2, "int16", torch.float32, marks=SLOW),
        (2, "int16", torch.bfloat16),
    ],
)
def test_warps_with_channels_of_their_own(
    sharers: int, numerics: Numerics, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a group of more rows than a program takes at a time, the rest of which are few."""
    sizes = Configuration(block_out=64, block_codes=512 * sharers, sharers=sharers)
    monkeypatch.setattr(importlib.import_module("meswitch_kernels.linear"), "configuration", lambda *_: sizes)
    layer = Layer.make(mixed_experts(70, 1100, 8), 70, 1100, device)
    check_both(layer, torch.tensor([0] * 19 + [3, 3]), dtype, numerics)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [pytest.param((0, 0), marks=SLOW, id="most"), pytest.param((4096, 14336), id="down")]
)
def test_sizes_that_are_shipped(shape: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a linear of these channels gets, for fewer."""

    def shipped(key: Key, device: torch.device) -> Configuration:
        return configuration(Key(key.kind, key.numerics, *shape), device)

    monkeypatch.setattr(importlib.import_module("meswitch_kernels.configurations"), "capability", lambda _: (9, 0))
    monkeypatch.setattr(importlib.import_module("meswitch_kernels.linear"), "configuration", shipped)
    layer = Layer.make(mixed_experts(40, 1100), 40, 1100, device)
    check_both(layer, torch.tensor([0, 1, 2, 2, 3, 3, -1] + [4] * 9), torch.bfloat16, "int16")


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@BOTH_SPEEDS
@pytest.mark.parametrize(
    "tests",
    [
        (test_rows_over_experts,),
        (
            test_sizes,
            test_dtypes,
            test_activations_with_an_outlier,
            test_the_check_sees_what_is_wrong,
            test_a_slot_that_changes_is_seen_at_once,
            test_runs_give_the_same_bits,
            test_warps_with_channels_of_their_own,
            test_sizes_that_are_shipped,
        ),
    ],
    ids=["rows", "rest"],
)
def test_kernels_in_the_interpreter(tests: tuple[Callable[..., None], ...], slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(__file__, *tests, slow=slow)


# What follows needs a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("numerics", NUMERICS)
def test_ptx_and_its_spelling_out_give_the_same_bits(numerics: Numerics, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer.make(mixed_experts(40, 2100), 40, 2100, "cuda")
    # Products of bytes on tensor cores are spelled out for the interpreter alone.
    rows = 16 if numerics == "exact" else 1
    index = torch.arange(rows)
    inputs = random_inputs(rows, 40, 2100, torch.bfloat16, "cuda")
    expected = run_both(layer, index, inputs, numerics)
    monkeypatch.setattr(importlib.import_module("meswitch_kernels.numerics"), "has_ptx", lambda device: False)
    assert all(map(torch.equal, expected, run_both(layer, index, inputs, numerics)))


@pytest.mark.gpu
def test_bytes_are_not_multiplied_where_tensor_cores_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer.make(mixed_experts(40, 2100), 40, 2100, "cuda")
    index = torch.tensor([0, 0, 1, 2, 2, 2])
    inputs = random_inputs(6, 40, 2100, torch.bfloat16, "cuda")
    exact, coarse = run_both(layer, index, inputs, "exact"), run_both(layer, index, inputs, "int8")
    module = importlib.import_module("meswitch_kernels.numerics")
    monkeypatch.setattr(module, "multiplies_bytes", lambda device: False)
    assert all(map(torch.equal, exact, run_both(layer, index, inputs, "int8")))
    assert not torch.equal(exact[0], coarse[0])


@pytest.mark.gpu
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("rows", [1, 16])
def test_a_graph_sees_other_rows_and_other_experts_without_compiling(rows: int, numerics: Numerics) -> None:
    kernels = [
        getattr(importlib.import_module(f"meswitch_kernels.triton_{module}"), f"_{name}_kernel")
        for module, name in (("delta_linear",) * 2, ("fused_linear",) * 2, ("activations", "prepare"))
    ]

    def count() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    out, width = 200, 4096
    layer = Layer.make(mixed_experts(out, width), out, width, "cuda")
    x, weight, bias = random_inputs(rows, out, width, torch.bfloat16, "cuda")
    index = torch.arange(rows, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        groups = group_rows(index)
        added = delta_linear(x, F.linear(x, weight), layer.table.rows, groups, out_features=out, numerics=numerics)
        return added, fused_linear(x, weight, bias, layer.table.rows, groups, numerics=numerics)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        added, fused = step()
    compiled = count()
    for experts in ([3] * 16, [-1, 0, 1, 2] * 4, list(range(16)), [5, 5, 6, 6] * 4):
        index.copy_(torch.tensor(experts[:rows]))
        replaced = move(random_leaves(out, width, 1 + experts[3] % 4, salient=7, seed=experts[0] + 50), "cuda")
        layer.table.set(3, replaced)
        layer.experts[3] = replaced
        added.fill_(float("nan"))
        fused.fill_(float("nan"))
        graph.replay()
        check(added, layer.expected(x, F.linear(x, weight), index.cpu()), numerics)
        check(fused, layer.expected(x, base_of_fused(x, weight, bias), index.cpu()), numerics)
    assert count() == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize(
    "experts",
    [[3], [3, 3], [3, 3, -1, 0, 1, 1, 2, 4] * 2, [0, 1, 2, 3, 4, 5, 6, 7], [2] * 16, [-1] * 4],
    ids=["one", "two", "mixed", "distinct", "shared", "base"],
)
def test_kernels_that_start_early_wait(
    experts: list[int], numerics: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linears that feed each other, so that one which does not wait for another reads what is not there yet.

    Where rows are distinct, or all share an expert, one of two kernels finds nothing to do, and with the base both.
    """
    width, depth, replays = 2048, 8, 6
    layers = [Layer.make(mixed_experts(width, width, 8), width, width, "cuda") for _ in range(depth)]
    weight = torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    index = torch.tensor(experts, device="cuda")
    inputs = torch.randn(replays, len(experts), width, device="cuda", dtype=torch.bfloat16)

    def chain(x: torch.Tensor) -> torch.Tensor:
        groups = group_rows(index)
        for layer in layers:
            y = fused_linear(x, weight, None, layer.table.rows, groups, numerics=numerics)
            x = delta_linear(y, y, layer.table.rows, groups, out_features=width, numerics=numerics)
            x = x / (1 + x.abs().mean())
        return x

    def answers() -> list[torch.Tensor]:
        x = inputs[0].clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            chain(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(x)
        found = []
        for own in inputs:  # without waiting in between
            x.copy_(own)
            graph.replay()
            found.append(y.clone())
        torch.cuda.synchronize()
        return found

    early = answers()
    monkeypatch.setattr(importlib.import_module("meswitch_kernels.numerics"), "overlaps", lambda device, ptx: False)
    assert all(map(torch.equal, early, answers()))
    assert not torch.equal(early[0], early[1])


@pytest.mark.gpu
@pytest.mark.parametrize("numerics", NUMERICS)
def test_widths_of_a_model(numerics: Numerics) -> None:
    for out, width in ((264, 14336), (1032, 4096)):
        experts: list[DeltaLeaves | None] = [
            random_leaves(out, width, bits, salient=16, column_steps=bits == 1) for bits in (1, 2, 3, 4)
        ]
        layer = Layer.make(experts, out, width, "cuda")
        for index in ([1], [0, 1, 2, 3, 3]):
            check_both(layer, torch.tensor(index), torch.bfloat16, numerics)


# What follows needs neither Triton nor a GPU.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_reference(distribution: str, dtype: torch.dtype) -> None:
    layer = Layer.make(mixed_experts(9, 70), 9, 70, "cpu")
    index = expert_indices(distribution, 16)
    x, weight, _ = random_inputs(len(index), 9, 70, dtype, "cpu")
    base_out = F.linear(x, weight)
    y = delta_linear_reference(x, base_out, layer.experts, index, out_features=9)
    check(y, layer.expected(x, base_out, index), "exact")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernels")
def test_operators_on_a_cpu_run_the_reference() -> None:
    assert not has_kernel(torch.device("cpu"))
    layer = Layer.make(mixed_experts(9, 70), 9, 70, "cpu")
    index = expert_indices("with_base", 16)
    x, weight, bias = random_inputs(16, 9, 70, torch.float32, "cpu")
    added, fused = run_both(layer, index, (x, weight, bias), "int8")
    base_out = F.linear(x, weight)
    assert torch.equal(added, delta_linear_reference(x, base_out, layer.experts, index, out_features=9))
    assert torch.allclose(fused, added + bias, atol=1e-6)


def test_no_rows() -> None:
    layer = Layer.make([random_leaves(4, 9, 2)], 4, 9, "cpu")
    groups = group_rows(torch.zeros(0, dtype=torch.int64))
    assert delta_linear(torch.zeros(0, 9), None, layer.table.rows, groups, out_features=4).shape == (0, 4)


@pytest.mark.skipif(INTERPRETED, reason="of the operators, not of the kernels")
def test_operators_are_well_formed() -> None:
    layer = Layer.make(mixed_experts(9, 70), 9, 70, "cpu")
    groups = layer.groups(expert_indices("with_base", 16))
    x, weight, bias = random_inputs(16, 9, 70, torch.float32, "cpu")
    arguments = (layer.table.rows, *groups)
    torch.library.opcheck(meswitch_kernels.linear._delta_linear, (x, None, *arguments, 9, "int8"))
    table, *groups = arguments
    torch.library.opcheck(meswitch_kernels.linear._fused_linears, (x, [weight], [bias], [table], *groups, "exact"))


@pytest.mark.skipif(INTERPRETED, reason="of the operators, not of the kernels")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_once_for_all_experts(device: str) -> None:
    out, width = 9, 70
    layer = Layer.make(mixed_experts(out, width), out, width, device)
    x, weight, bias = random_inputs(16, out, width, torch.float32, device)
    frames = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=frames)
    def step(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        groups = group_rows(index)
        fused = fused_linear(x, weight, bias, layer.table.rows, groups)
        return fused + delta_linear(x, None, layer.table.rows, groups, out_features=out)

    base = F.linear(x, weight, bias).cpu()
    for seed, distribution in enumerate(("with_base", "zipf", "identical")):
        replaced = move(random_leaves(out, width, 4 - seed, seed=seed + 90), device)
        layer.table.set(1, replaced)
        layer.experts[1] = replaced
        index = expert_indices(distribution, 16)
        total, size = layer.expected(x, torch.zeros(16, out), index)
        check(step(x, index.to(device)), (2 * total + base, 2 * size), "exact")
    assert frames.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numerics": "int4"}, "numerics is 'int4', expected one of exact, int8, int16"),
        ({"x": torch.zeros(2, 3, 4)}, r"x is torch.float32 of shape \(2, 3, 4\), expected \[rows, in\]"),
        ({"x": torch.zeros(2, 4, dtype=torch.int8)}, "x is torch.int8"),
        ({"x": torch.zeros(5, 4)}, "groups are of 2 rows, but x has 5"),
        ({"table": torch.zeros(1, 4, dtype=torch.int64)}, r"expected contiguous int64 \[slots, 9\]"),
        ({"base_out": torch.zeros(2, 4)}, r"base_out is of shape \(2, 4\), expected \(2, 3\)"),
        ({"base_out": torch.zeros(2, 3).half()}, "base_out is torch.float16 on cpu, but x is torch.float32 on cpu"),
        ({"table": torch.zeros(1, 9, dtype=torch.int64, device="meta")}, "the table on meta"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 4),
        "base_out": None,
        "table": torch.zeros(1, 9, dtype=torch.int64),
        "groups": group_rows(torch.tensor([0, 0])),
        "out_features": 3,
    }
    with pytest.raises(ValueError, match=message):
        delta_linear(**{**arguments, **change})  # type: ignore[arg-type]


def test_random_deltas_are_what_they_say() -> None:
    """The tests' own arithmetic, once by hand: two codes of two bits and a salient channel between them."""
    codes = torch.tensor([[0b0110]], dtype=torch.uint8)
    leaves = DeltaLeaves(codes, torch.tensor([2.0]), 2, salient_index=torch.tensor([1], dtype=torch.int32))
    leaves = replace(leaves, salient=torch.tensor([[9.0]], dtype=torch.bfloat16))
    assert dense_delta(leaves, 3).tolist() == [[1.0, 9.0, -1.0]]
