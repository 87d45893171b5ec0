"""Linear layers by scratch weights: rows over experts against float64, and the streams and graphs of a real device."""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from meswitch_kernels import DeltaLeaves, PrefillLayer, ScratchRing, prefill, prefill_linear
from tests.kernels.random_deltas import Layer, dense_delta, move, random_leaves
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Of the result's own size: rounding of the weight and of the result; the interpreter truncates.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Groups = Sequence[tuple[int | None, torch.Tensor | None]]


class Model:
    """Linears one after the other, each back to the first one's width, with three experts and an empty slot."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, sizes: Sequence[int] = (40, 90, 33)) -> None:
        self.device, self.placed, self.layers = device, list[Layer](), list[PrefillLayer]()
        generator = torch.Generator().manual_seed(0)
        for number, (width, out) in enumerate(zip(sizes, [*sizes[1:], sizes[0]], strict=True)):
            experts: list[DeltaLeaves | None] = [
                random_leaves(
                    out,
                    width,
                    bits,
                    salient=min(3 * bits % 4, width),
                    column_steps=bits == 1,
                    bias=bits == 2,
                    seed=bits,
                )
                for bits in (1, 2, 4)
            ]
            self.placed.append(Layer.make([*experts, None], out, width, device))
            weight = (torch.randn(out, width, generator=generator) / width**0.5).to(device, dtype)
            bias = torch.randn(out, generator=generator).to(device, dtype) if number % 2 else None
            self.layers.append(PrefillLayer(weight, self.placed[-1].table.rows, bias, expert_bias=True))

    def inputs(self, *shape: int, seed: int = 1) -> torch.Tensor:
        layer = self.layers[0]
        x = torch.randn(*shape, layer.weight.shape[1], generator=torch.Generator().manual_seed(seed))
        return x.to(self.device, layer.weight.dtype)

    def run(self, x: torch.Tensor, groups: Groups, ring: ScratchRing, **options: Any) -> torch.Tensor:
        slots = [slot for slot, _ in groups if slot is not None]
        for layer, after in zip(self.layers, [*self.layers[1:], None], strict=True):
            then = (after, slots[0]) if after is not None and slots else None
            x = prefill_linear(x, layer, groups, ring, then=then, **options)
        return x

    def plain(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """The same in float64 on the CPU, from weights that are rounded as the model's are."""
        x = x.cpu()
        for placed, layer in zip(self.placed, self.layers, strict=True):
            y = torch.full((*x.shape[:-1], layer.weight.shape[0]), float("nan"), dtype=x.dtype)
            for slot, rows in groups:
                expert = None if slot is None else placed.experts[slot]
                weight = layer.weight.cpu().double()
                bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.cpu().double()
                if expert is not None:
                    weight = weight + dense_delta(expert, weight.shape[1])
                    bias = bias if expert.bias is None else bias + expert.bias.cpu().double()
                here = slice(None) if rows is None else rows.cpu()
                y[here] = F.linear(x[here].double(), weight, bias).to(x.dtype)
            x = y
        return x


def check(y: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.double().square().mean().sqrt()
    error = (y.cpu().double() - expected.double()).abs().max() / scale
    assert error < 12 * TOLERANCE[y.dtype], error


def groups_of(index: Sequence[int], device: str) -> list[tuple[int | None, torch.Tensor | None]]:
    """Rows of each expert; -1 is the base."""
    return [
        (None if slot < 0 else slot, torch.tensor([i for i, s in enumerate(index) if s == slot], device=device))
        for slot in dict.fromkeys(index)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=SLOW), pytest.param(torch.float16, marks=SLOW)],
    ids=str,
)
@pytest.mark.parametrize("index", [None, [0], [2, 2, 2], [0, 1, 2, 3, -1, 1], [-1, 1, -1], [-1, -1], []], ids=str)
def test_rows_over_experts(index: list[int] | None, dtype: torch.dtype, device: str) -> None:
    model, ring = Model(device, dtype), ScratchRing(device)
    groups: Groups = [(1, None)] if index is None else groups_of(index, device)
    x = model.inputs(3 if index is None else len(index), 5)
    for _ in range(2):
        y = model.run(x, groups, ring)
        assert y.shape == x.shape
        if x.numel():
            check(y, model.plain(x, groups))


@pytest.mark.skipif(INTERPRETED, reason="of the rows, not of the kernel")
@settings(max_examples=30)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=8), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_any_rows_and_sizes(index: list[int], sizes: list[int]) -> None:
    model = Model("cpu", sizes=sizes)
    x, groups = model.inputs(len(index)), groups_of(index, "cpu")
    check(model.run(x, groups, ScratchRing("cpu")), model.plain(x, groups))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Chunks of 256 channels where few bytes are allowed, whatever the rows.

    Returns:
        Of each chunk written: its first channel, how many, whether it was ahead.
    """
    monkeypatch.setattr(prefill, "_CHUNK_PRODUCTS", 1)
    written: list[tuple[int, int, bool]] = []
    write = prefill._Chunk.write

    def note(self: Any, memory: torch.Tensor, ahead: bool) -> None:
        written.append((self.first, self.channels, ahead))
        write(self, memory, ahead)

    monkeypatch.setattr(prefill._Chunk, "write", note)
    return written


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("index", "ahead"),
    [
        (None, True),
        pytest.param(None, False, marks=SLOW),
        pytest.param([0, -1, 1, 0, 3], True, marks=SLOW),
        ([0, -1, 1, 0, 3], False),
    ],
    ids=str,
)
def test_chunks(index: list[int] | None, ahead: bool, device: str, small_chunks: list[tuple[int, int, bool]]) -> None:
    """Whole and ragged ones, of layers with and without a bias; two of them, or one, are all the memory there is."""
    model, ring = Model(device, sizes=(20, 600, 256)), ScratchRing(device)
    groups: Groups = [(1, None)] if index is None else groups_of(index, device)
    x = model.inputs(3 if index is None else len(index), 2)
    y = model.run(x, groups, ring, chunk_bytes=1, ahead=ahead)
    check(y, model.plain(x, groups))
    experts = sum(slot is not None for slot, _ in groups)
    chunks = [(0, 256), (256, 256), (512, 88)] * experts + [(0, 256)] * experts + [(0, 20)] * experts
    assert [chunk[:2] for chunk in small_chunks] == chunks
    assert [chunk[2] for chunk in small_chunks] == [False] + [ahead] * (len(chunks) - 1)
    assert 0 < ring.nbytes <= (2 if ahead else 1) * 4 * (256 * 600 + 256)


@pytest.mark.parametrize("device", DEVICES)
def test_a_wrong_first_channel_is_noticed(
    device: str, small_chunks: list[tuple[int, int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ring = Model(device, sizes=(20, 600)), ScratchRing(device)
    x = model.inputs(3)
    expected = model.plain(x, [(1, None)])
    check(model.run(x, [(1, None)], ring, chunk_bytes=1), expected)
    write = prefill.write_sum
    monkeypatch.setattr(prefill, "write_sum", lambda *arguments: write(*arguments[:6], 0, *arguments[7:]))
    with pytest.raises(AssertionError):
        check(model.run(x, [(1, None)], ring, chunk_bytes=1), expected)


@pytest.mark.skipif(INTERPRETED, reason="of the chunks, not of the kernel")
@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    index=st.lists(st.integers(-1, 3), min_size=1, max_size=5),
    unit=st.integers(1, 16),
    chunk_bytes=st.integers(0, 4000),
    ahead=st.booleans(),
)
def test_any_chunks(sizes: list[int], index: list[int], unit: int, chunk_bytes: int, ahead: bool) -> None:
    model, ring = Model("cpu", sizes=sizes), ScratchRing("cpu")
    x, groups = model.inputs(len(index), 2), groups_of(index, "cpu")
    whole = model.run(x, groups, ring, chunk_bytes=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "_CHUNK_PRODUCTS", 1)
        patch.setattr(prefill, "_CHUNK_CHANNELS", unit)
        chunked = model.run(x, groups, ring, chunk_bytes=chunk_bytes, ahead=ahead)
    check(chunked, whole)


@pytest.mark.parametrize(
    ("shape", "rows", "mebibytes", "channels"),
    [
        ((28672, 4096), 2048, 16, [2048] * 14),
        ((28672, 4096), 2048, 24, [3072] * 9 + [1024]),
        ((28672, 4096), 8192, 12, [1536] * 18 + [1024]),
        ((6144, 4096), 2048, 32, [3072] * 2),
        ((4096, 14336), 2048, 16, [512] * 8),
        ((4096, 14336), 8192, 4, [256] * 16),
        # Few rows: larger chunks.
        ((28672, 4096), 512, 16, [4096] * 7),
        ((28672, 4096), 20, 16, [28672]),
        ((28672, 4096), 2048, None, [28672]),
        ((700, 4096), 2048, 16, [700]),
        ((0, 4096), 2048, 16, []),
        ((700, 0), 2048, 16, [700]),
        ((700, 4096), 0, 16, [700]),
    ],
    ids=str,
)
def test_sizes_of_chunks(shape: tuple[int, int], rows: int, mebibytes: int | None, channels: list[int]) -> None:
    layer = PrefillLayer(torch.empty(shape, dtype=torch.bfloat16, device="meta"), torch.empty(0))
    chunks = prefill._chunks(layer, 0, rows, None if mebibytes is None else mebibytes << 20, None)
    assert [chunk.channels for chunk in chunks] == channels
    assert [chunk.first for chunk in chunks] == [sum(channels[:i]) for i in range(len(channels))]


@pytest.mark.parametrize("device", DEVICES)
def test_the_check_sees_what_is_wrong(device: str) -> None:
    model, ring = Model(device), ScratchRing(device)
    x = model.inputs(3)
    expected = model.plain(x, groups_of([0, 1, 2], device))
    check(model.run(x, groups_of([0, 1, 2], device), ring), expected)
    for wrong in ([0, 1, 1], [0, -1, 2], [0, 2, 1]):
        with pytest.raises(AssertionError):
            check(model.run(x, groups_of(wrong, device), ring), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_runs_give_the_same_bits_whether_announced_or_not(device: str) -> None:
    model, ring = Model(device, torch.float16), ScratchRing(device)
    x, groups = model.inputs(4, 3), groups_of([0, 1, 0, -1], device)
    first = model.run(x, groups, ring)
    assert torch.equal(model.run(x, groups, ring), first)
    y = x
    for layer in model.layers:
        y = prefill_linear(y, layer, groups, ring, programs=1)
    assert torch.equal(y, first)


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_on_the_device(device: str) -> None:
    model, ring = Model(device), ScratchRing(device)
    x, slot = model.inputs(3), torch.tensor([0], device=device)
    for number in (0, 2, 3, -1):
        slot.fill_(number)
        y = x
        for layer, after in zip(model.layers, [*model.layers[1:], None], strict=True):
            y = prefill_linear(y, layer, [(slot, None)], ring, then=None if after is None else (after, slot))
        check(y, model.plain(x, [(None if number < 0 else number, None)]))


@pytest.mark.parametrize("device", DEVICES)
def test_weight_of_a_conv1d(device: str) -> None:
    model, ring = Model(device), ScratchRing(device)
    layer, x = model.layers[0], model.inputs(3)
    transposed = PrefillLayer(layer.weight.T.contiguous().T, layer.table)
    y = prefill_linear(x, transposed, [(0, None)], ring)
    assert torch.allclose(y, prefill_linear(x, layer, [(0, None)], ring), atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_are_as_large_as_the_largest_layer(device: str) -> None:
    model, ring = Model(device, sizes=(256, 512, 256)), ScratchRing(device)
    model.run(model.inputs(2), [(1, None)], ring)
    assert 0 < ring.nbytes <= 2 * (4 * 512 * 256 + 4 * 512)


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernel_in_the_interpreter(slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(
        __file__,
        test_rows_over_experts,
        test_runs_give_the_same_bits_whether_announced_or_not,
        test_a_slot_on_the_device,
        test_weight_of_a_conv1d,
        test_chunks,
        test_a_wrong_first_channel_is_noticed,
        slow=slow,
    )


def test_gradients_there_are_none() -> None:
    model = Model("cpu")
    x = model.inputs(2).requires_grad_()
    assert not model.run(x, [(1, None)], ScratchRing("cpu")).requires_grad


def test_inference_mode_and_what_comes_after_it(small_chunks: list[tuple[int, int, bool]]) -> None:
    model, ring = Model("cpu", sizes=(20, 600)), ScratchRing("cpu")
    with torch.inference_mode():
        x = model.inputs(2)
        inferred = model.run(x, [(1, None)], ring, chunk_bytes=1)
    assert torch.equal(model.run(x, [(1, None)], ring, chunk_bytes=1), inferred)
    assert torch.equal(model.run(x.clone().requires_grad_(), [(1, None)], ring, chunk_bytes=1), inferred)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(40)}, r"x is of shape \(40,\), expected \[batch, ..., 40\]"),
        ({"x": torch.zeros(2, 41)}, r"x is of shape \(2, 41\)"),
        ({"x": torch.zeros(2, 40).half()}, "x is torch.float16 on cpu, but weight is torch.float32 on cpu"),
        ({"groups": [(0, torch.tensor([0]))]}, "groups have 1 rows in all, but x has 2"),
        ({"groups": [(0, None), (1, None)]}, "groups have 4 rows"),
        ({"groups": [(0, None), (1, torch.zeros(0, dtype=torch.int64))]}, "each belongs to one group"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(2, 40), "groups": [(0, None)], "layer": Model("cpu").layers[0]}
    with pytest.raises(ValueError, match=message):
        prefill_linear(**{**arguments, **change}, ring=ScratchRing("cpu"))  # type: ignore[arg-type]


def test_slots_that_there_are_not() -> None:
    with pytest.raises(IndexError, match="slot 4 is not one of the table's 4"):
        prefill_linear(torch.zeros(2, 40), Model("cpu").layers[0], [(4, None)], ScratchRing("cpu"))


# What follows needs a GPU. Layers are large enough for a write and a matmul to meet.

LARGE = (4096, 8192, 4096, 2048, 8192, 1024)


@pytest.mark.gpu
def test_a_graph_sees_other_inputs_and_other_experts() -> None:
    model, ring = Model("cuda", torch.bfloat16, LARGE), ScratchRing("cuda")
    x = model.inputs(2, 512)
    groups: list[Groups] = [[(1, None)], groups_of([2, 0], "cuda")]
    graphs = []
    for rows in groups:
        model.run(x, rows, ring)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model.run(x, rows, ring)
        graphs.append((graph, y))
    for seed in (1, 2, 3):
        x.copy_(model.inputs(2, 512, seed=seed))
        for placed in model.placed:
            out, width = placed.table.out_features, placed.table.in_features
            placed.experts[1] = move(random_leaves(out, width, 1 + seed, salient=seed, seed=seed), "cuda")
            placed.table.set(1, placed.experts[1])
        for rows, (graph, y) in zip(groups, graphs, strict=True):
            y.fill_(float("nan"))
            graph.replay()
            # Eager work between the replays, and in the same memory if that were shared.
            again = model.run(x, rows, ring)
            assert torch.equal(y, again)
    check(graphs[0][1][:, :4], model.plain(x[:, :4], groups[0]))


@pytest.mark.gpu
def test_graphs_that_share_a_pool_or_were_captured_by_threads() -> None:
    model, ring = Model("cuda", torch.bfloat16, LARGE), ScratchRing("cuda")
    x, pool = model.inputs(2, 256), torch.cuda.graph_pool_handle()
    expected = model.run(x, [(1, None)], ring)
    captured: list[tuple[torch.cuda.CUDAGraph, torch.Tensor]] = []

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            captured.append((graph, model.run(x, [(1, None)], ring)))

    def capture_in_thread() -> None:
        # cuBLAS makes itself ready once a thread, which no graph can record.
        model.run(x, [(1, None)], ring)
        torch.cuda.synchronize()
        capture()

    capture()
    capture()
    thread = threading.Thread(target=capture_in_thread)
    thread.start()
    thread.join()
    assert len(captured) == 3
    for graph, y in captured:
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_streams_and_threads() -> None:
    model, ring = Model("cuda", torch.bfloat16, LARGE), ScratchRing("cuda")
    inputs = [model.inputs(2, 256, seed=seed) for seed in range(4)]
    expected = [model.run(x, [(seed % 3, None)], ScratchRing("cuda")) for seed, x in enumerate(inputs)]
    wrong: list[int] = []
    torch.cuda.synchronize()

    def run(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                y = model.run(inputs[seed], [(seed % 3, None)], ring)
                if not torch.equal(y, expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    model, ring = Model("cuda", torch.bfloat16, LARGE), ScratchRing("cuda")
    x, groups = model.inputs(2, 512), groups_of([2, 0], "cuda")
    model.run(x, groups, ring)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        begin = torch.cuda.Event()
        begin.record()
        model.run(x, groups, ring)
        assert not begin.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_memory_goes_with_the_ring() -> None:
    model = Model("cuda", torch.bfloat16, LARGE)
    x = model.inputs(2, 16)
    torch.matmul(x[0], x[0].T)  # the workspace of cuBLAS
    ring = ScratchRing("cuda")
    model.run(x, [(1, None)], ring)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = ring.nbytes
    del ring
    gc.collect()
    assert before - torch.cuda.memory_allocated() >= held > 0


@pytest.mark.gpu
def test_the_write_runs_beside_the_matmul() -> None:
    """In the profile, some writes overlap with a matmul."""
    model, ring = Model("cuda", torch.bfloat16, LARGE), ScratchRing("cuda")
    x = model.inputs(4, 2048)
    # Whole weights, which take long enough to write.
    run = functools.partial(model.run, x, [(1, None)], ring, chunk_bytes=None)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events() if e.time_range.elapsed_us() > 5]
    writes = [span for span in spans if "_add_delta" in span[0]]
    others = [span for span in spans if "_add_delta" not in span[0] and "Memcpy" not in span[0]]
    assert writes
    assert any(w[1] < o[2] and o[1] < w[2] for w in writes for o in others), spans
