"""A weight plus a delta against float32 arithmetic of the tests' own, bit for bit: the kernel and the reference.

On a CPU the kernel runs in Triton's interpreter, which has to be chosen before Triton is imported; so one test starts
this file again in a process of its own.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import meswitch_kernels
from meswitch_kernels import DeltaLeaves, ExpertTable, add_delta, add_delta_reference, has_kernel, merged_weight
from tests.kernels.random_deltas import Layer, move, random_leaves
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (out, in, salient channels, column steps): single elements, all salient, whole blocks, tails of blocks, groups and
#: words.
SIZES = [(1, 1, 0, False), (2, 1, 1, False), (3, 7, 7, True), (32, 256, 0, False), (33, 512, 16, True)]
SIZES += [(17, 531, 3, True), (18, 263, 17, False), (5, 97, 40, True)]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of which -0 and 0 are unlike, and a NaN like itself."""
    return tensor.cpu().contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def expected_weight(weight: torch.Tensor, leaves: DeltaLeaves, fused: bool = False) -> torch.Tensor:
    """``[out, in]`` in the weight's dtype; ``fused``: as if a product were not rounded before it is added."""
    weight, width = weight.cpu(), weight.shape[1]
    stream = np.unpackbits(leaves.codes.cpu().numpy(), axis=1, bitorder="little")
    salient = [] if leaves.salient_index is None else leaves.salient_index.tolist()
    coded = [channel for channel in range(width) if channel not in set(salient)]
    taken = stream[:, : len(coded) * leaves.bits].reshape(len(stream), len(coded), leaves.bits)
    codes = torch.from_numpy(taken.astype(np.float32)) @ torch.tensor([1.0, 2, 4, 8][: leaves.bits])
    delta = torch.full(weight.shape, float("nan"), dtype=torch.float64 if fused else torch.float32)
    value = (codes - (2**leaves.bits - 1) / 2).to(delta.dtype) * leaves.step.cpu()[:, None]
    delta[:, coded] = value if leaves.column_step is None else value * leaves.column_step.cpu()
    if leaves.salient is not None:
        delta[:, salient] = leaves.salient.cpu().to(delta.dtype)
    return rounded((weight.to(delta.dtype) + delta).float(), weight.dtype)


def rounded(total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bfloat16 and INTERPRETED:
        # Triton's interpreter drops the low half of a float32 where a GPU rounds it.
        total = (total.view(torch.int32) & -65536).view(torch.float32)
    return total.to(dtype)


def random_weight(out: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out * 1000 + width)
    weight = (torch.randn(out, width, generator=generator) * 2e-2).to(dtype)
    weight.view(-1)[:1] = -0.0
    return weight.to(device)


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype
    assert torch.equal(bits_of(out), bits_of(expected))


def table_of(leaves: DeltaLeaves | None, weight: torch.Tensor) -> ExpertTable:
    """Three slots; the one in the middle has the expert. The caller keeps it, and so the tensors."""
    out, width = weight.shape
    wrong = random_leaves(out, width, 4, seed=99)
    return Layer.make([wrong, leaves, wrong], out, width, weight.device.type).table


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [1, pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)])
def test_every_element_is_written_and_nothing_else(bits: int, size: tuple[int, int, int, bool], device: str) -> None:
    out, width, salient, column_steps = size
    leaves = move(random_leaves(out, width, bits, salient=salient, column_steps=column_steps), device)
    for dtype in DTYPES:
        weight = random_weight(out, width, dtype, device)
        margin = 513  # odd, so that the result is not aligned either
        memory = torch.full((out * width + 2 * margin,), float("nan"), dtype=dtype, device=device)
        result = memory[margin:-margin].view(out, width)
        merged_weight(weight, leaves, out=result)
        check(result, expected_weight(weight, leaves))
        assert memory[:margin].isnan().all()
        assert memory[-margin:].isnan().all()
        check(weight, random_weight(out, width, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype: torch.dtype, device: str) -> None:
    leaves = move(random_leaves(35, 300, 3, salient=5, column_steps=True), device)
    weight = random_weight(35, 300, dtype, device)
    expected = expected_weight(weight, leaves)
    assert merged_weight(weight, leaves, out=weight) is weight
    check(weight, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device: str) -> None:
    """Rows in wider memory, and the weight of a ``Conv1D``, which is transposed."""
    leaves = move(random_leaves(35, 300, 2, salient=5), device)
    weight = random_weight(35, 300, torch.float16, device)
    expected = expected_weight(weight, leaves)
    wide = torch.full((35, 320), float("nan"), dtype=weight.dtype, device=device)
    narrow = wide[:, 3:303]
    narrow.copy_(weight)
    transposed = weight.T.contiguous().T
    for source in (narrow, transposed):
        check(merged_weight(source, leaves), expected)
        check(merged_weight(source, leaves, out=torch.empty_like(transposed)), expected)
    merged_weight(weight, leaves, out=narrow)
    check(narrow, expected)
    assert wide[:, :3].isnan().all()
    assert wide[:, 303:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_slots(device: str) -> None:
    leaves = random_leaves(20, 90, 2, salient=3)
    weight = random_weight(20, 90, torch.bfloat16, device)
    table = table_of(leaves, weight)
    expected = expected_weight(weight, leaves)
    check(add_delta(weight, table.rows, 1), expected)
    for dtype in (torch.int32, torch.int64):
        check(add_delta(weight, table.rows, torch.tensor([1], dtype=dtype, device=device)), expected)
        # The base alone, whose -0 adding 0 would not keep.
        check(add_delta(weight, table.rows, torch.tensor([-1], dtype=dtype, device=device)), weight.cpu())
    weight[3] = float("nan")
    check(add_delta(weight, table_of(None, weight).rows, 1), weight.cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("base_bias", [False, True])
def test_bias(base_bias: bool, expert_bias: bool, device: str) -> None:
    leaves = random_leaves(50, 300, 2, bias=expert_bias)
    weight = random_weight(50, 300, torch.float16, device)
    bias = random_weight(50, 1, torch.float16, device)[:, 0] if base_bias else None
    total = torch.zeros(50) if bias is None else bias.cpu().float()
    expected = total if leaves.bias is None else total + leaves.bias
    written = torch.full((50,), float("nan"), dtype=torch.float16, device=device)
    table = table_of(leaves, weight)
    out = add_delta(weight, table.rows, 1, bias=bias, bias_out=written)
    check(out, expected_weight(weight, leaves))
    assert torch.equal(written.cpu(), expected.half())
    add_delta(weight, table.rows, torch.tensor([-1], device=device), bias=bias, bias_out=written)
    assert torch.equal(written.cpu(), total.half())
    if bias is not None:
        add_delta(weight, table.rows, 1, bias=bias, bias_out=bias)
        assert torch.equal(bias.cpu(), expected.half())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [1, 3])
def test_some_channels_at_a_time(bits: int, device: str) -> None:
    """Parts of any size, from any channel on, with the delta's own rows, salient channels and biases."""
    out, width = 70, 531
    leaves = random_leaves(out, width, bits, salient=5, column_steps=True, bias=True)
    weight, bias = random_weight(out, width, torch.float32, device), random_weight(out, 1, torch.float32, device)[:, 0]
    table = table_of(leaves, weight)
    expected = expected_weight(weight, leaves)
    assert leaves.bias is not None
    for slot in (1, torch.tensor([1], device=device)):
        written, bias_out = torch.full_like(weight, float("nan")), torch.full_like(bias, float("nan"))
        for here in (slice(0, 1), slice(1, 17), slice(17, 32), slice(32, out)):
            add_delta(
                weight[here],
                table.rows,
                slot,
                out=written[here],
                bias=bias[here],
                bias_out=bias_out[here],
                first_channel=here.start,
            )
            assert written[here.stop :].isnan().all()
        check(written, expected)
        assert torch.equal(bias_out.cpu(), bias.cpu() + leaves.bias)
    with pytest.raises(AssertionError):
        check(add_delta(weight[32:], table.rows, 1, first_channel=31), expected[32:])


@pytest.mark.parametrize("device", DEVICES)
def test_few_programs_write_the_same_and_runs_do(device: str) -> None:
    # Seven rows of two blocks.
    leaves = random_leaves(200, 300, 2, salient=5, column_steps=True)
    weight = random_weight(200, 300, torch.bfloat16, device)
    table = table_of(leaves, weight)
    expected = expected_weight(weight, leaves)
    for programs in (None, None, 1, 5, 10_000):
        check(add_delta(weight, table.rows, 1, programs=programs), expected)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15 if INTERPRETED else 100)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 600),
    bits=st.integers(1, 4),
    salient=st.integers(0, 20),
    column_steps=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    device: str, out: int, width: int, bits: int, salient: int, column_steps: bool, dtype: torch.dtype
) -> None:
    leaves = random_leaves(out, width, bits, salient=min(salient, width), column_steps=column_steps)
    weight = random_weight(out, width, dtype, device)
    result = torch.full((out, width), float("nan"), dtype=dtype, device=device)
    merged_weight(weight, move(leaves, device), out=result)
    check(result, expected_weight(weight, leaves))


@pytest.mark.parametrize("device", DEVICES)
def test_the_check_sees_what_is_wrong(device: str) -> None:
    leaves = move(random_leaves(33, 530, 2, salient=3, column_steps=True), device)
    weight = random_weight(33, 530, torch.float32, device)
    expected = expected_weight(weight, leaves)
    assert not torch.equal(expected, expected_weight(weight, leaves, fused=True))
    table = table_of(leaves, weight)
    check(add_delta(weight, table.rows, 1), expected)
    with pytest.raises(AssertionError):
        check(add_delta(weight, table.rows, 0), expected)
    leaves.codes[32, 100] ^= 1
    with pytest.raises(AssertionError):
        check(merged_weight(weight, leaves), expected)
    leaves.codes[32, 100] ^= 1
    assert leaves.salient_index is not None
    leaves.salient_index[1] += 1
    with pytest.raises(AssertionError):
        check(merged_weight(weight, leaves), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_no_inputs(device: str) -> None:
    table = ExpertTable(1, 3, 0, device).rows
    bias = torch.ones(3, device=device)
    written = torch.full_like(bias, float("nan"))
    assert add_delta(torch.zeros(3, 0, device=device), table, 0, bias=bias, bias_out=written).shape == (3, 0)
    assert torch.equal(written, bias)


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernel_in_the_interpreter(slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(
        __file__,
        test_every_element_is_written_and_nothing_else,
        test_in_place,
        test_strides,
        test_slots,
        test_bias,
        test_some_channels_at_a_time,
        test_few_programs_write_the_same_and_runs_do,
        test_any_shape,
        test_the_check_sees_what_is_wrong,
        test_no_inputs,
        slow=slow,
    )


# What follows needs a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(4096, 14336), (28672, 4096)], ids=str)
def test_shapes_of_a_model(size: tuple[int, int], bits: int) -> None:
    out, width = size
    leaves = move(random_leaves(out, width, bits, salient=16, column_steps=bits == 1), "cuda")
    weight = random_weight(out, width, torch.bfloat16, "cuda")
    expected = torch.full_like(weight, float("nan"))
    add_delta_reference(weight, leaves, expected)
    check(merged_weight(weight, leaves, out=torch.full_like(weight, float("nan"))), expected.cpu())
    for sizes in ((4, 256, 4, 4), (8, 512, 1, 8), (16, 256, 2, 8)):
        module = importlib.import_module("meswitch_kernels.triton_add_delta")
        again = torch.full_like(weight, float("nan"))
        table = table_of(leaves, weight)
        module.add_delta_triton(again, weight, None, None, table.rows[1:2], None, sizes=module.AddSizes(*sizes))
        assert torch.equal(again, expected)


@pytest.mark.gpu
def test_elements_past_two_to_the_31() -> None:
    out, width = 2**17 + 8, 2**14
    weight = torch.ones(out, width, dtype=torch.bfloat16, device="cuda")
    codes = torch.full((out, width // 8), 0xFF, dtype=torch.uint8, device="cuda")
    step = torch.arange(out, device="cuda") % 100 * 2.0
    merged_weight(weight, DeltaLeaves(codes, step, 1), out=weight)
    assert torch.equal(weight[:, -1].float(), 1 + step / 2)
    assert torch.equal(weight[-1].float(), (1 + step[-1] / 2).expand(width))


@pytest.mark.gpu
def test_a_graph_sees_the_expert_that_is_there() -> None:
    out, width = 200, 4096
    weight = random_weight(out, width, torch.bfloat16, "cuda")
    layer = Layer.make([random_leaves(out, width, 2), random_leaves(out, width, 3, salient=7)], out, width, "cuda")
    slot = torch.tensor([0], device="cuda")
    add_delta(weight, layer.table.rows, slot)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = add_delta(weight, layer.table.rows, slot)
    for number in (0, 1, -1, 1):
        slot.fill_(number)
        if number == 1:
            layer.experts[1] = move(random_leaves(out, width, 4, salient=16, column_steps=True, seed=7), "cuda")
            layer.table.set(1, layer.experts[1])
        result.fill_(float("nan"))
        graph.replay()
        expert = layer.experts[number] if number >= 0 else None
        check(result, weight.cpu() if expert is None else expected_weight(weight, expert))


# What follows needs neither Triton nor a GPU.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.skipif(INTERPRETED, reason="torch rounds, the interpreter's expectation does not")
def test_reference(bits: int, dtype: torch.dtype) -> None:
    for out, width, salient, column_steps in SIZES:
        leaves = random_leaves(out, width, bits, salient=salient, column_steps=column_steps)
        weight = random_weight(out, width, dtype, "cpu")
        result = torch.full_like(weight, float("nan"))
        add_delta_reference(weight, leaves, result)
        check(result, expected_weight(weight, leaves))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernel")
def test_operator_on_a_cpu_runs_the_reference() -> None:
    assert not has_kernel(torch.device("cpu"))
    for test in (test_in_place, test_bias, test_slots, test_strides, test_some_channels_at_a_time):
        arguments = {"dtype": torch.bfloat16, "base_bias": True, "expert_bias": True, "bits": 3, "device": "cpu"}
        test(**{name: arguments[name] for name in test.__annotations__ if name in arguments})


@pytest.mark.skipif(INTERPRETED, reason="of the operator, not of the kernel")
def test_operator_is_well_formed() -> None:
    leaves = random_leaves(5, 21, 2, salient=2, bias=True)
    weight, bias = random_weight(5, 21, torch.float32, "cpu"), torch.ones(5)
    table = table_of(leaves, weight)
    operator = meswitch_kernels.add_delta.__globals__["_add_delta"]
    slot = torch.tensor([1])
    for source, number, bias_out, in_place in (
        (weight, slot, None, False),
        (None, slot, bias.clone(), False),
        (weight, None, bias.clone(), True),
    ):
        arguments = (source, table.rows[1:2] if number is None else table.rows, number, torch.empty_like(weight), bias)
        torch.library.opcheck(operator, (*arguments, bias_out, in_place, 0, None))


@pytest.mark.skipif(INTERPRETED, reason="of the operator, not of the kernel")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_once_for_all_experts(device: str) -> None:
    out, width = 9, 70
    layer = Layer.make([random_leaves(out, width, bits, salient=bits) for bits in (1, 2, 3)], out, width, device)
    weight = random_weight(out, width, torch.float32, device)
    frames = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=frames)
    def step(weight: torch.Tensor, slot: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        add_delta(weight, layer.table.rows, slot, out=scratch)
        return scratch + add_delta(weight, layer.table.rows, slot)

    for number in (0, 2, 1):
        expert = layer.experts[number]
        assert expert is not None
        scratch = torch.full_like(weight, float("nan"))
        twice = step(weight, torch.tensor([number], device=device), scratch)
        expected = expected_weight(weight, expert)
        check(scratch, expected)
        check(twice, 2 * expected)
    assert frames.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3)}, r"weight is torch.float32 of shape \(3,\), expected \[out, in\]"),
        ({"weight": torch.zeros(3, 4).double()}, "weight is torch.float64"),
        ({"table": torch.zeros(1, 4, dtype=torch.int64)}, r"expected contiguous int64 \[slots, 9\]"),
        ({"table": torch.zeros(1, 9, dtype=torch.int64, device="meta")}, "weight is on cpu, but the table on meta"),
        ({"slot": torch.tensor([0.0])}, "slot is torch.float32"),
        ({"slot": torch.tensor([0, 1])}, r"slot is torch.int64 of shape \(2,\)"),
        ({"out": torch.zeros(4, 3)}, r"out is of shape \(4, 3\), expected \(3, 4\)"),
        ({"out": torch.zeros(3, 4).half()}, "out is torch.float16 on cpu, but weight is torch.float32 on cpu"),
        ({"bias": torch.zeros(4)}, r"bias is of shape \(4,\), expected \(3,\)"),
        ({"bias_out": torch.zeros(6)[::2]}, r"bias_out has strides \(2,\)"),
        ({"first_channel": -1}, "first_channel is -1, expected 0 or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"weight": torch.zeros(3, 4), "table": torch.zeros(1, 9, dtype=torch.int64), "slot": 0}
    with pytest.raises(ValueError, match=message):
        add_delta(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("slot", [-1, 1])
def test_slots_that_there_are_not(slot: int) -> None:
    with pytest.raises(IndexError, match=f"slot {slot} is not one of the table's 1"):
        add_delta(torch.zeros(3, 4), torch.zeros(1, 9, dtype=torch.int64), slot)


def test_leaves_that_do_not_fit_are_refused() -> None:
    leaves = random_leaves(3, 4, 2)
    with pytest.raises(ValueError, match=r"step is of shape \(2,\), expected \(3,\)"):
        merged_weight(torch.zeros(3, 4), replace(leaves, step=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"weight is of shape \(3,\)"):
        merged_weight(torch.zeros(3), leaves)
