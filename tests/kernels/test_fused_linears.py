"""Several linears of one input in one launch against each of them in float64."""

from __future__ import annotations

import os

import pytest
import torch

from meswitch_kernels import ExpertTable, fused_linears, group_rows
from meswitch_kernels.linear import Numerics
from tests.kernels.random_deltas import Layer
from tests.kernels.test_delta_linear import base_of_fused, check, mixed_experts, poisoned_memory
from tests.triton_interpreter import check_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTH = 1031
#: Output channels, whole blocks and tails, more and fewer than a block; and the expert of each row.
CASES: list[tuple[tuple[int, ...], list[int]]] = [
    ((40, 16, 33), [0, 3, 3, -1, 7]),
    ((32, 7), [1]),
    ((17, 16), [2] * 3),
    ((40, 16, 33), [1]),
    ((32, 7), [-1]),
    ((17,), [0, 3, 3, -1, 7]),
    ((17,), [1]),
    ((40, 16, 33), [2] * 16),
]


class Linears:
    """Linears of different sizes whose experts differ in bits, salient channels, column steps and biases."""

    def __init__(self, shapes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = [
            Layer.make(mixed_experts(out, WIDTH)[k:] + [None] * k, out, WIDTH, device) for k, out in enumerate(shapes)
        ]
        self.weights = [(torch.randn(out, WIDTH, generator=generator) * 1e-2).to(device, dtype) for out in shapes]
        self.biases = [torch.randn(out, generator=generator).to(device, dtype) for out in shapes]
        self.dtype, self.device = dtype, device

    def inputs(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(self.device, self.dtype)

    def together(
        self, x: torch.Tensor, index: torch.Tensor, numerics: Numerics, **changed: object
    ) -> list[torch.Tensor]:
        arguments = {"weights": self.weights, "biases": self.biases, "tables": [one.table.rows for one in self.layers]}
        with poisoned_memory():
            return fused_linears(x, groups=self.layers[0].groups(index), numerics=numerics, **(arguments | changed))

    def check(self, ys: list[torch.Tensor], x: torch.Tensor, index: torch.Tensor, numerics: Numerics) -> None:
        for y, layer, weight, bias in zip(ys, self.layers, self.weights, self.biases, strict=True):
            check(y, layer.expected(x, base_of_fused(x, weight, bias), index), numerics)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shapes", "index"), CASES[:3] if INTERPRETED else CASES, ids=str)  # the interpreter is slow
def test_each_is_what_it_is_alone(shapes: tuple[int, ...], index: list[int], device: str) -> None:
    linears, experts = Linears(shapes, torch.float32, device), torch.tensor(index)
    x = linears.inputs(len(index))
    numerics: tuple[Numerics, ...] = ("int16", "exact")
    for one in numerics[:1] if INTERPRETED and len(shapes) == 3 else numerics:
        linears.check(linears.together(x, experts, one), x, experts, one)


@pytest.mark.parametrize("device", DEVICES)
def test_one_of_another_linear_is_noticed(device: str) -> None:
    """The check can fail: linears whose tables were exchanged."""
    linears, experts = Linears((17, 17), torch.float32, device), torch.tensor([1])
    x = linears.inputs(1)
    ys = linears.together(x, experts, "int16", tables=[one.table.rows for one in reversed(linears.layers)])
    with pytest.raises(AssertionError):
        linears.check(ys, x, experts, "int16")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    linears = Linears((40, 16), dtype, device)
    for index in ([4],) if INTERPRETED else ([4], [0, 4, 4]):
        x, experts = linears.inputs(len(index)), torch.tensor(index)
        linears.check(linears.together(x, experts, "int16"), x, experts, "int16")


@pytest.mark.parametrize("device", DEVICES)
def test_weights_and_biases_that_are_not_alike(device: str) -> None:
    """They cannot share a launch of one row with their bases, and give the same."""
    linears, experts = Linears((40, 16), torch.float32, device), torch.tensor([3])
    x = linears.inputs(1)
    linears.weights[1] = linears.weights[1].T.contiguous().T
    linears.check(linears.together(x, experts, "int16"), x, experts, "int16")
    biases = [linears.biases[0], None]
    linears.biases[1] = torch.zeros_like(linears.biases[1])
    linears.check(linears.together(x, experts, "int16", biases=biases), x, experts, "int16")


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device: str) -> None:
    linears = Linears((17, 16), torch.float32, device)
    none = linears.together(linears.inputs(0), torch.tensor([], dtype=torch.int64), "int16")
    assert [tuple(y.shape) for y in none] == [(0, 17), (0, 16)]
    table = ExpertTable(1, 0, WIDTH, device).rows
    empty = fused_linears(
        linears.inputs(1), [linears.weights[0][:0]], [None], [table], group_rows(torch.tensor([0], device=device))
    )
    assert [tuple(y.shape) for y in empty] == [(1, 0)]


@pytest.mark.gpu
def test_a_graph_and_compiled_code() -> None:
    linears, experts = Linears((40, 16, 33), torch.bfloat16, "cuda"), torch.tensor([3])
    groups, tables = linears.layers[0].groups(experts), [one.table.rows for one in linears.layers]
    x = linears.inputs(1)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        return fused_linears(x, linears.weights, linears.biases, tables, groups)

    expected = run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(x)
    for y in replayed:
        y.zero_()
    graph.replay()
    for ys in (replayed, torch.compile(run, fullgraph=True)(x)):
        assert all(torch.equal(a, b) for a, b in zip(ys, expected, strict=True))


def test_the_reference_on_a_cpu() -> None:
    linears, experts = Linears((40, 16, 33), torch.float32, "cpu"), torch.tensor([0, 3, 3, -1, 7])
    x = linears.inputs(5)
    linears.check(linears.together(x, experts, "int16"), x, experts, "exact" if not INTERPRETED else "int16")


def test_bad_input_is_refused_by_name() -> None:
    x, weight, table = torch.ones(1, 2), torch.ones(3, 2), ExpertTable(1, 3, 2).rows
    groups = group_rows(torch.tensor([0]))
    with pytest.raises(ValueError, match="1 weights, 2 biases and 1 tables"):
        fused_linears(x, [weight], [None, None], [table], groups)
    with pytest.raises(ValueError, match="0 weights"):
        fused_linears(x, [], [], [], groups)
    with pytest.raises(ValueError, match=r"weight is of shape \(3, 1\), expected \(3, 2\)"):
        fused_linears(x, [weight, weight[:, :1]], [None, None], [table, table], groups)
    with pytest.raises(ValueError, match=r"bias is of shape \(2,\), expected \(3,\)"):
        fused_linears(x, [weight, weight], [None, torch.ones(2)], [table, table], groups)
    with pytest.raises(ValueError, match="groups are of 1 rows, but x has 2"):
        fused_linears(torch.ones(2, 2), [weight], [None], [table], groups)


@pytest.mark.skipif(INTERPRETED, reason="runs the tests above")
def test_in_the_interpreter() -> None:
    check_interpreted(
        __file__,
        test_each_is_what_it_is_alone,
        test_one_of_another_linear_is_noticed,
        test_dtypes,
        test_weights_and_biases_that_are_not_alike,
        test_nothing_to_do,
    )
