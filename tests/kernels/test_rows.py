"""Rows of embeddings and heads of mixed batches against float64: in the interpreter, on a GPU, by the reference."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import meswitch_kernels
from meswitch_kernels import (
    RowsLeaves,
    RowsTable,
    configurations,
    embed_rows,
    embed_rows_reference,
    group_rows,
    head_rows,
    head_rows_reference,
    map_rows,
)
from meswitch_kernels.rows_table import ROWS_COLUMNS
from meswitch_kernels.table_views import rows_of_slot
from tests.kernels.random_deltas import dense_delta, move, random_leaves
from tests.kernels.test_delta_linear import DEVICES, INTERPRETED, ROUNDING, poisoned_memory
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted, slow_when_interpreted


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows here are short; the interpreter works on all of a tile."""
    if INTERPRETED:
        monkeypatch.setattr(configurations, "_DEFAULT", configurations.Configuration(block_out=32, block_codes=512))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASE_ROWS = 70


@dataclass(frozen=True)
class Expert:
    """Rows of an expert and, worked out apart from them, what they stand for.

    Attributes:
        leaves: on the device.
        delta: float64 ``[known, width]``, what is added to the base's rows; zero where nothing is.
        own: float64 ``[known, width]``, the rows that are the expert's own; NaN where they are not.
        bias: float64 ``[known]``.
    """

    leaves: RowsLeaves
    delta: torch.Tensor
    own: torch.Tensor
    bias: torch.Tensor

    @property
    def is_own(self) -> torch.Tensor:
        return ~self.own.isnan()[:, 0]

    @property
    def is_coded(self) -> torch.Tensor:
        return self.delta.ne(0).any(1)


def random_expert(
    width: int,
    known: int,
    bits: int | None,
    device: str,
    *,
    coded: float = 0.5,
    own: float = 0.1,
    salient: int = 0,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    seed: int = 0,
) -> Expert:
    """An expert of random contents; ids that the base lacks are its own, others by the shares given."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(known, generator=generator)
    is_own = (draw < own) | (torch.arange(known) >= BASE_ROWS)
    is_coded = ~is_own & (draw < own + coded) & (bits is not None)
    own_ids, coded_ids = is_own.nonzero()[:, 0], is_coded.nonzero()[:, 0]
    rows = torch.randn(len(own_ids), width, generator=generator).to(dtype)
    shift = torch.randn(known, generator=generator)
    whole = Expert(
        RowsLeaves(map_rows(known, coded_ids, own_ids, torch.device("cpu")).to(device)),
        torch.zeros(known, width, dtype=torch.float64),
        torch.full((known, width), float("nan"), dtype=torch.float64),
        shift.double() if bias else torch.zeros(known, dtype=torch.float64),
    )
    whole.own[own_ids] = rows.double()
    leaves = replace(whole.leaves, own=rows.to(device) if len(rows) else None, bias=shift.to(device) if bias else None)
    if bits is not None and len(coded_ids):
        quantised = random_leaves(len(coded_ids), width, bits, salient=salient, seed=seed)
        whole.delta[coded_ids] = dense_delta(quantised, width)
        leaves = replace(leaves, coded=move(quantised, device))
    return replace(whole, leaves=leaves)


@dataclass(frozen=True)
class Rows:
    experts: list[Expert | None]
    table: RowsTable
    device: str

    @classmethod
    def make(cls, experts: list[Expert | None], width: int, device: str) -> Rows:
        table = RowsTable(len(experts), width, device)
        for slot, expert in enumerate(experts):
            if expert is not None:
                table.set(slot, expert.leaves)
        return cls(experts, table, device)

    def expert(self, slot: int) -> Expert | None:
        return self.experts[slot] if slot >= 0 else None


def mixed_rows(width: int, device: str) -> Rows:
    """All bits, vocabularies smaller and larger than the base's, own rows of all dtypes, and an empty slot."""
    salient = min(5, width)
    experts = [
        random_expert(width, BASE_ROWS, 1, device, seed=1),
        random_expert(width, BASE_ROWS + 7, 2, device, coded=1.0, own=0.0, salient=salient, bias=True, seed=2),
        random_expert(width, BASE_ROWS - 20, 3, device, dtype=torch.bfloat16, seed=3),
        random_expert(width, BASE_ROWS + 1, 4, device, salient=width, dtype=torch.float16, bias=True, seed=4),
        random_expert(width, BASE_ROWS + 30, None, device, own=0.3, seed=5),
        random_expert(width, BASE_ROWS - 3, None, device, own=0.0, seed=6),
        None,
    ]
    return Rows.make(experts, width, device)


def some_ids(rows: Rows, index: list[int], tokens: int, seed: int = 0) -> torch.Tensor:
    """int64 ``[batch, tokens]`` that each row's expert knows."""
    generator = torch.Generator().manual_seed(seed)
    limits = [BASE_ROWS if (expert := rows.expert(slot)) is None else len(expert.delta) for slot in index]
    return torch.stack([torch.randint(0, limit, (tokens,), generator=generator) for limit in limits])


def check_embeddings(
    rows: Rows, index: list[int], dtype: torch.dtype, tokens: int = 9, scale: float | None = None, seed: int = 0
) -> None:
    """The very bits of an embedding in which each expert's rows were changed; but see the interpreter."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(BASE_ROWS, rows.table.width, generator=generator).to(dtype)
    ids = some_ids(rows, index, tokens, seed)
    factor = None if scale is None else torch.tensor(scale)
    expected = F.embedding(ids.clamp_max(BASE_ROWS - 1), weight)
    for row, slot in enumerate(index):
        expert = rows.expert(slot)
        if expert is not None:
            matrix = torch.zeros(len(expert.delta), rows.table.width, dtype=dtype)
            shared = min(BASE_ROWS, len(matrix))
            matrix[:shared] = (weight[:shared].float() + expert.delta[:shared].float()).to(dtype)
            matrix[expert.is_own] = expert.own[expert.is_own].to(dtype)
            expected[row] = matrix[ids[row]]
    base = F.embedding(ids.clamp_max(BASE_ROWS - 1), weight)
    if factor is not None:
        expected, base = expected * factor.to(dtype), base * factor.to(dtype)
    arguments = (ids, base, weight, rows.table.coded, rows.table.rows, torch.tensor(index, dtype=torch.int32))
    with poisoned_memory():
        found = embed_rows(
            *(a.to(rows.device) for a in arguments), scale=None if factor is None else factor.to(rows.device)
        )
    assert found.dtype == dtype
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter truncates the row, the factor and their product.
        assert torch.allclose(found.cpu().float(), expected.float(), rtol=3 * 2**-7, atol=0)
    else:
        assert torch.equal(found.cpu(), expected)


def head_inputs(rows: Rows, count: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, base_out = (torch.randn(count, n, generator=generator) for n in (rows.table.width, BASE_ROWS))
    return x.to(rows.device, dtype), base_out.to(rows.device, dtype)


def check_logits(logits: torch.Tensor, rows: Rows, index: list[int], x: torch.Tensor, base_out: torch.Tensor) -> None:
    """Every logit, by sums in float64, within what the result and the products' inputs are rounded by."""
    rounding = ROUNDING[x.dtype]
    for row, slot in enumerate(index):
        expert, inputs = rows.expert(slot), x[row].cpu().double()
        expected = torch.full((logits.shape[1],), float("-inf"), dtype=torch.float64)
        size = torch.zeros_like(expected)
        shared = min(BASE_ROWS, len(expected))
        expected[:shared] = base_out[row, :shared].cpu().double()
        if expert is not None:
            known = min(len(expert.delta), len(expected))
            own = expert.own.to(x.dtype).double()[:known]
            theirs = torch.where(own.isnan()[:, 0], expected[:known] + expert.delta[:known] @ inputs, own @ inputs)
            expected[known:] = float("-inf")
            expected[:known] = theirs + expert.bias[:known]
            summands = torch.where(own.isnan(), expert.delta[:known], own)
            size[:known] = (summands * inputs).square().sum(1).sqrt() + expert.bias[:known].abs()
        found = logits[row].cpu().double()
        assert torch.equal(found.isneginf(), expected.isneginf())
        finite = expected.isfinite()
        allowed = 2 * rounding * expected.abs() + (4 * rounding + 1e-5) * size + 1e-6
        error = (found - expected).abs()
        assert (error <= allowed)[finite].all(), (error / allowed)[finite].max()


def run_head(rows: Rows, index: list[int], x: torch.Tensor, base_out: torch.Tensor, capacity: int) -> torch.Tensor:
    groups = group_rows(torch.tensor(index, dtype=torch.int32, device=rows.device))
    with poisoned_memory():
        return head_rows(x, base_out, rows.table.coded, rows.table.rows, groups, capacity=capacity)


BATCHES = [
    [1],
    [4],
    [6],
    [-1, -1],
    [2, 2, 2],
    [3, -1, 3, 1, 4, 4, 1],
    pytest.param([0, 1, 2, 3, 4, 5, 6, -1], marks=SLOW),
    pytest.param([1] * 17, marks=SLOW),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", BATCHES, ids=str)
def test_batches(index: list[int], device: str) -> None:
    rows = mixed_rows(100, device)
    check_embeddings(rows, index, torch.float32)
    x, base_out = head_inputs(rows, len(index), torch.float32)
    check_logits(run_head(rows, index, x, base_out, BASE_ROWS + 30), rows, index, x, base_out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=SLOW), torch.bfloat16, pytest.param(torch.float16, marks=SLOW)],
    ids=str,
)
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    rows, index = mixed_rows(100, device), [0, 1, 2, 3, 4, 4, 3, -1]
    check_embeddings(rows, index, dtype)
    check_embeddings(rows, index, dtype, scale=7.3)
    x, base_out = head_inputs(rows, len(index), dtype)
    check_logits(run_head(rows, index, x, base_out, BASE_ROWS + 30), rows, index, x, base_out)


@slow_when_interpreted
@pytest.mark.parametrize("device", DEVICES)
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    width=st.sampled_from([1, 7, 64, 65, 1030]),
    known=st.sampled_from([1, 16, 69, 70, 71, 90]),
    bits=st.sampled_from([1, 2, 3, 4]),
    shares=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.3, 0.3), (0.0, 0.0), (0.02, 0.02)]),
    salient=st.sampled_from([0, 1, 17]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sizes(
    device: str, width: int, known: int, bits: int, shares: Any, salient: int, bias: bool, seed: int
) -> None:
    salient, (coded, own) = min(salient, width), shares
    expert = random_expert(width, known, bits, device, coded=coded, own=own, salient=salient, bias=bias, seed=seed)
    rows = Rows.make([None, expert], width, device)
    index = [1, -1, 1] if seed % 2 else [1]
    check_embeddings(rows, index, torch.float16, tokens=5, seed=seed)
    for capacity in (max(known, BASE_ROWS), 65):
        x, base_out = head_inputs(rows, len(index), torch.float32, seed)
        check_logits(run_head(rows, index, x, base_out, capacity), rows, index, x, base_out)


@pytest.mark.parametrize("device", DEVICES)
def test_the_checks_see_what_is_wrong(device: str) -> None:
    rows, index = mixed_rows(100, device), [1, 2, 4]
    x, base_out = head_inputs(rows, 3, torch.float32)
    right = run_head(rows, index, x, base_out, BASE_ROWS + 30)
    check_logits(right, rows, index, x, base_out)
    for wrong in ([1, 2, 3], [1, -1, 4], [0, 2, 4]):
        with pytest.raises(AssertionError):
            check_logits(run_head(rows, wrong, x, base_out, BASE_ROWS + 30), rows, index, x, base_out)
    for slot in (1, 4):
        expert = rows.experts[slot]
        assert expert is not None
        row_map = expert.leaves.row_map
        changed = int((row_map != -1).nonzero()[3])
        place = row_map[changed].clone()
        row_map[changed] = -1
        with pytest.raises(AssertionError):
            check_logits(run_head(rows, index, x, base_out, BASE_ROWS + 30), rows, index, x, base_out)
        with pytest.raises(AssertionError):
            check_embeddings(rows, [slot], torch.float32, tokens=150)
        row_map[changed] = place


@pytest.mark.parametrize("device", DEVICES)
def test_ids_that_nobody_knows_read_no_memory_but_the_base(device: str) -> None:
    rows = mixed_rows(100, device)
    weight = torch.randn(BASE_ROWS, 100, device=device)
    ids = torch.tensor([[-1, 2**40, BASE_ROWS + 7]], device=device)
    base = torch.randn(1, 3, 100, device=device)
    index = torch.tensor([1], dtype=torch.int32, device=device)
    assert torch.equal(embed_rows(ids, base, weight, rows.table.coded, rows.table.rows, index), base)


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_that_changes_is_seen_at_once(device: str) -> None:
    rows, index = Rows.make([None], 100, device), [0, -1]
    for expert in (None, random_expert(100, 77, 3, device, seed=8), random_expert(100, 60, 1, device, seed=9)):
        if expert is None:
            rows.table.clear(0)
        else:
            rows.table.set(0, expert.leaves)
        rows.experts[0] = expert
        check_embeddings(rows, index, torch.float32)
        x, base_out = head_inputs(rows, 2, torch.float32)
        check_logits(run_head(rows, index, x, base_out, 77), rows, index, x, base_out)


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter(slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(
        __file__,
        test_batches,
        test_dtypes,
        test_sizes,
        test_the_checks_see_what_is_wrong,
        test_ids_that_nobody_knows_read_no_memory_but_the_base,
        test_a_slot_that_changes_is_seen_at_once,
        slow=slow,
    )


# What follows needs a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2048, 4096])
def test_widths_of_a_model(width: int) -> None:
    rows, index = mixed_rows(width, "cuda"), [0, 1, 2, 3, 3, 4, -1]
    check_embeddings(rows, index, torch.bfloat16)
    x, base_out = head_inputs(rows, len(index), torch.bfloat16)
    check_logits(run_head(rows, index, x, base_out, BASE_ROWS + 30), rows, index, x, base_out)


@pytest.mark.gpu
def test_a_graph_sees_other_experts() -> None:
    rows = mixed_rows(256, "cuda")
    x, base_out = head_inputs(rows, 4, torch.bfloat16)
    index = torch.zeros(4, dtype=torch.int32, device="cuda")

    def step() -> torch.Tensor:
        return head_rows(x, base_out, rows.table.coded, rows.table.rows, group_rows(index), capacity=100)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for chosen in ([1, 1, 1, 1], [0, 1, 2, 3], [4, -1, 4, 6]):
        replaced = random_expert(256, 75 + chosen[1], 2, "cuda", seed=chosen[0] + 50)
        rows.table.set(1, replaced.leaves)
        rows.experts[1] = replaced
        index.copy_(torch.tensor(chosen))
        logits.fill_(float("nan"))
        graph.replay()
        check_logits(logits, rows, chosen, x, base_out)


# What follows needs neither Triton nor a GPU.


@pytest.mark.skipif(INTERPRETED, reason="of the reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", BATCHES, ids=str)
def test_operators_on_a_cpu_run_the_reference(index: list[int], dtype: torch.dtype) -> None:
    rows = mixed_rows(30, "cpu")
    check_embeddings(rows, index, dtype)
    check_embeddings(rows, index, dtype, scale=7.3)
    x, base_out = head_inputs(rows, len(index), dtype)
    logits = run_head(rows, index, x, base_out, BASE_ROWS + 30)
    check_logits(logits, rows, index, x, base_out)
    leaves = [expert and expert.leaves for expert in rows.experts]
    again = head_rows_reference(x, base_out, leaves, torch.tensor(index), capacity=BASE_ROWS + 30)
    assert torch.equal(again, logits)


@pytest.mark.skipif(INTERPRETED, reason="of the operators, not of the kernels")
def test_operators_are_well_formed() -> None:
    rows = mixed_rows(30, "cpu")
    x, base_out = head_inputs(rows, 4, torch.float32)
    groups = group_rows(torch.tensor([0, 1, 1, -1], dtype=torch.int32))
    tables = (rows.table.coded, rows.table.rows)
    torch.library.opcheck(meswitch_kernels.rows._head_rows, (x, base_out, *tables, *groups, 90))
    index = torch.tensor([0, -1], dtype=torch.int32)
    weight, ids = torch.randn(BASE_ROWS, 30), some_ids(rows, [0, -1], 5)
    arguments = (ids, weight[ids], weight, torch.tensor(2.0), *tables, index)
    torch.library.opcheck(meswitch_kernels.rows._embed_rows, arguments)


def test_no_tokens() -> None:
    rows = mixed_rows(30, "cpu")
    tables, index = (rows.table.coded, rows.table.rows), torch.zeros(0, dtype=torch.int32)
    weight, ids = torch.randn(BASE_ROWS, 30), torch.zeros(0, 4, dtype=torch.int64)
    assert embed_rows(ids, weight[ids], weight, *tables, index).shape == (0, 4, 30)
    assert head_rows(weight[:0], weight[:0], *tables, group_rows(index), capacity=9).shape == (0, 9)


@given(st.lists(st.sampled_from("bco"), max_size=30), st.integers(0, 30))
def test_maps(sorts: list[str], known: int) -> None:
    coded, own = (torch.tensor([i for i, s in enumerate(sorts) if s == sort]) for sort in "co")
    found = map_rows(known, coded, own, torch.device("cpu")).tolist()
    assert len(found) == known
    for row, place in enumerate(found):
        sort = sorts[row] if row < len(sorts) else "b"
        assert {"b": place == -1, "c": place >= 0, "o": place < -1}[sort]
        if sort != "b":
            assert (coded if sort == "c" else own)[place if sort == "c" else -2 - place] == row


def test_views_of_a_slot_are_the_owners_tensors() -> None:
    rows = mixed_rows(30, "cpu")
    for slot, expert in enumerate(rows.experts):
        found = rows_of_slot(rows.table.coded, rows.table.rows, slot, 30)
        assert (found is None) == (expert is None)
        if expert is None or found is None:
            continue
        assert torch.equal(found.row_map, expert.leaves.row_map)
        assert (found.coded is None) == (expert.leaves.coded is None)
        for name in ("own", "bias"):
            ours, theirs = getattr(found, name), getattr(expert.leaves, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and ours.data_ptr() == theirs.data_ptr())


def test_memory_is_held_until_the_slot_is_cleared() -> None:
    table = RowsTable(1, 8)
    leaves = random_expert(8, BASE_ROWS + 2, 2, "cpu").leaves
    assert leaves.own is not None
    assert leaves.coded is not None
    kept = [weakref.ref(t.untyped_storage()) for t in (leaves.row_map, leaves.own, leaves.coded.codes)]
    table.set(0, leaves)
    larger = table.resized(4)
    assert torch.equal(larger.rows[0], table.rows[0])
    assert torch.equal(larger.coded[0], table.coded[0])
    with pytest.raises(ValueError, match="slots is 3, expected at least the table's 4"):
        larger.resized(3)
    del leaves
    gc.collect()
    assert all(ref() is not None for ref in kept)
    table.clear(0)
    larger.clear(0)
    gc.collect()
    assert all(ref() is None for ref in kept)
    assert not table.rows.any()
    assert not table.coded.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_map": torch.zeros(5)}, "row_map is of dtype torch.float32, expected torch.int32"),
        ({"own": torch.zeros(1, 8).double()}, "own is of dtype torch.float64, expected torch.float32 or torch.bfl"),
        ({"own": torch.zeros(1, 9)}, r"own is of shape \(1, 9\), expected \(1, 8\)"),
        ({"own": torch.zeros(8, 2).T}, r"own has strides \(1, 2\); it has to be contiguous"),
        ({"bias": torch.zeros(4)}, r"bias is of shape \(4,\), expected \(5,\)"),
        ({"bias": torch.zeros(5, device="meta")}, "bias is on meta, but the layer is on cpu"),
        ({"coded": move(random_leaves(2, 8, 2, bias=True), "cpu")}, "neither column steps nor a bias"),
        ({"coded": move(random_leaves(2, 9, 1), "cpu")}, r"codes is of shape \(2, 2\), expected \(2, 1\)"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    table = RowsTable(1, 8)
    leaves = RowsLeaves(map_rows(5, None, None, torch.device("cpu")))
    with pytest.raises(ValueError, match=message):
        table.set(0, replace(leaves, **change))  # type: ignore[arg-type]
    assert not table.rows.any()
    with pytest.raises(IndexError, match="slot 1 is not one of the table's 1"):
        table.set(1, leaves)


ROWS_TABLE = torch.zeros(1, len(ROWS_COLUMNS), dtype=torch.int64)
CODED_TABLE = torch.zeros(1, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_out": torch.zeros(2, 3, 5)}, r"base_out is torch.float32 of shape \(2, 3, 5\), expected \(2, 3, 4\)"),
        ({"base_out": torch.zeros(2, 2, 4)}, r"expected \(2, 3, 4\)"),
        ({"base_out": torch.zeros(2, 3, 4).double()}, "base_out is torch.float64"),
        ({"weight": torch.zeros(4, 6).T}, r"weight has strides \(1, 6\); its rows have to be"),
        ({"expert_index": torch.zeros(2)}, "expert_index is torch.float32"),
        ({"expert_index": torch.zeros(3, dtype=torch.int32)}, r"expected torch.int32 \(2,\)"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "ids on meta"),
        ({"rows_table": CODED_TABLE}, r"rows_table is torch.int64 of shape \(1, 9\), expected int64 \[slots, 5\]"),
        ({"coded_table": CODED_TABLE.to("meta")}, "coded_table is on meta"),
    ],
    ids=str,
)
def test_embeddings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        "base_out": torch.zeros(2, 3, 4),
        "weight": torch.zeros(6, 4),
        "coded_table": CODED_TABLE,
        "rows_table": ROWS_TABLE,
        "expert_index": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        embed_rows(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x is torch.float32 of shape \(2, 3, 4\), expected a matrix"),
        ({"base_out": torch.zeros(2, 6).int()}, "base_out is torch.int32"),
        ({"base_out": torch.zeros(3, 6)}, "x has 2 rows and base_out 3, but groups are of 2"),
        ({"base_out": torch.zeros(2, 6, device="meta")}, "base_out on meta"),
        ({"coded_table": ROWS_TABLE}, r"coded_table is torch.int64 of shape \(1, 5\)"),
    ],
    ids=str,
)
def test_logits_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 4),
        "base_out": torch.zeros(2, 6),
        "coded_table": CODED_TABLE,
        "rows_table": ROWS_TABLE,
        "groups": group_rows(torch.zeros(2, dtype=torch.int32)),
        "capacity": 6,
    }
    with pytest.raises(ValueError, match=message):
        head_rows(**{**arguments, **change})


def test_the_reference_of_embeddings_leaves_its_input_alone() -> None:
    rows = mixed_rows(30, "cpu")
    weight, ids = torch.randn(BASE_ROWS, 30), some_ids(rows, [0], 40)[0]
    base = weight[ids]
    before = base.clone()
    leaves = [expert and expert.leaves for expert in rows.experts]
    found = embed_rows_reference(ids, base, weight, leaves, torch.zeros(40, dtype=torch.int32))
    assert torch.equal(base, before)
    assert not torch.equal(found, base)
