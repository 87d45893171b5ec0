"""The table of resident experts, the layout of codes in memory, and the grouping of rows."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meswitch_kernels import DeltaLeaves, ExpertTable, align_rows, group_rows, row_groups
from meswitch_kernels.expert_table import COLUMNS
from meswitch_kernels.table_views import leaves_of_slot
from tests.kernels.random_deltas import move, random_leaves
from tests.kernels.test_delta_linear import DEVICES, INTERPRETED, poisoned_memory
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted


def test_views_of_a_slot_are_the_owners_tensors() -> None:
    table = ExpertTable(3, 5, 21)
    for leaves in (
        random_leaves(5, 21, 3, salient=2, column_steps=True, bias=True),
        random_leaves(5, 21, 1),
        random_leaves(5, 21, 2, salient=21),
    ):
        leaves = move(leaves, "cpu")
        table.set(2, leaves)
        found = leaves_of_slot(table.rows, 2, 5, 21)
        assert found is not None
        assert found.bits == leaves.bits
        assert found.tensors().keys() == leaves.tensors().keys()
        for name, tensor in leaves.tensors().items():
            assert torch.equal(found.tensors()[name], tensor)
            assert tensor.numel() == 0 or found.tensors()[name].data_ptr() == tensor.data_ptr()
        assert leaves_of_slot(table.rows, 1, 5, 21) is None


def test_memory_is_held_until_the_slot_is_cleared() -> None:
    table = ExpertTable(1, 5, 21)
    leaves = move(random_leaves(5, 21, 2), "cpu")
    kept = weakref.ref(leaves.step.untyped_storage())
    step = leaves.step.clone()
    owner = torch.nn.Parameter(leaves.step, requires_grad=False)
    table.set(0, replace(leaves, step=owner))
    # As module.to(...) does it.
    owner.data = torch.zeros(5)
    del leaves, owner
    gc.collect()
    found = leaves_of_slot(table.rows, 0, 5, 21)
    assert found is not None
    assert torch.equal(found.step, step)
    table.clear(0)
    gc.collect()
    assert kept() is None
    assert not table.rows.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits is 5, expected 1, 2, 3 or 4"),
        ({"codes": torch.zeros(5, 5, dtype=torch.int8)}, "codes is of dtype torch.int8, expected torch.uint8"),
        ({"codes": torch.zeros(5, 6, dtype=torch.uint8)}, r"codes is of shape \(5, 6\), expected \(5, 5\)"),
        ({"codes": torch.zeros(5, 5, dtype=torch.uint8)}, r"multiples of 16 bytes.*align_rows"),
        ({"step": torch.zeros(5).half()}, "step is of dtype torch.float16, expected torch.float32"),
        ({"step": torch.zeros(10)[::2]}, r"step has strides \(2,\); it has to be contiguous"),
        ({"column_step": torch.zeros(21)}, r"column_step is of shape \(21,\), expected \(19,\)"),
        ({"salient": None}, "belong together"),
        ({"salient_index": torch.zeros(2, dtype=torch.int64)}, "salient_index is of dtype torch.int64"),
        ({"salient": torch.zeros(5, 3, dtype=torch.bfloat16)}, r"salient is of shape \(5, 3\), expected \(5, 2\)"),
        ({"bias": torch.zeros(5, device="meta")}, "bias is on meta, but the layer is on cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    table = ExpertTable(1, 5, 21)
    leaves = move(random_leaves(5, 21, 2, salient=2), "cpu")
    with pytest.raises(ValueError, match=message):
        table.set(0, replace(leaves, **change))  # type: ignore[arg-type]
    assert not table.rows.any()


@pytest.mark.parametrize("slot", [-1, 2])
def test_slots_that_there_are_not(slot: int) -> None:
    table = ExpertTable(2, 1, 2)
    with pytest.raises(IndexError, match=f"slot {slot} is not one of the table's 2"):
        table.clear(slot)
    with pytest.raises(IndexError, match=f"slot {slot}"):
        table.set(slot, move(random_leaves(1, 2, 2), "cpu"))


@given(out=st.integers(0, 5), width=st.integers(0, 40), offset=st.integers(0, 17))
def test_aligned_codes_are_the_same_codes(out: int, width: int, offset: int) -> None:
    memory = torch.randint(0, 256, (offset + out * width,), dtype=torch.uint8)
    codes = memory[offset:].view(out, width)
    aligned = align_rows(codes)
    assert torch.equal(aligned, codes)
    assert align_rows(aligned) is aligned
    step = torch.zeros(out)
    if width:
        ExpertTable(1, out, width * 8).set(0, DeltaLeaves(aligned, step, 1))


def test_rows_that_end_where_their_memory_ends_are_not_aligned() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    whole = align_rows(memory[:64].view(4, 16))
    assert whole.data_ptr() == memory.data_ptr()
    cut = memory[: 3 * 16 + 8].clone().as_strided((4, 8), (16, 1))
    assert align_rows(cut).data_ptr() != cut.data_ptr()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(index=st.lists(st.integers(-3, 6), max_size=40), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_groups(device: str, index: list[int], dtype: torch.dtype) -> None:
    order, slot, start, count = (t.tolist() for t in group_rows(torch.tensor(index, dtype=dtype, device=device)))
    experts = [max(expert, -1) for expert in index]
    assert sorted(order) == list(range(len(index)))
    assert slot == [experts[row] for row in order]
    groups = [slot[a:b] for a, b in itertools.pairwise(start)]
    assert len(start) == len(index) + 1
    singles, whole = count
    assert [group for group in groups if group] == groups[:whole]
    assert all(len(set(group)) <= 1 for group in groups)
    # Those of one row first, the experts of either in order, and each once.
    assert {len(group) for group in groups[:singles]} <= {1}
    assert all(len(group) > 1 for group in groups[singles:whole])
    for part in (groups[:singles], groups[singles:whole]):
        assert [group[0] for group in part] == sorted({group[0] for group in part})
    assert sorted(group[0] for group in groups[:whole]) == sorted(set(experts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "rows", [1, 16, 17, 128, 129, *(pytest.param(rows, marks=SLOW) for rows in (2, 15, 100, 127))]
)
def test_comparing_and_sorting_group_alike(rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(rows)
    launched: list[int] = []

    def watched(index: torch.Tensor, *groups: torch.Tensor) -> None:
        launched.append(len(index))
        group_rows_triton(index, *groups)

    group_rows_triton = row_groups._group_with_triton
    assert group_rows_triton is not None
    monkeypatch.setattr(row_groups, "_group_with_triton", watched)
    for slots in (1, 4, rows, 1000):
        for dtype in (torch.int32, torch.int64):
            memory = torch.randint(-2, slots, (2 * rows + 1,), generator=generator, dtype=dtype).to(device)
            # Neighbours, at an address that is a multiple of no more than their size, and apart.
            for index in (memory[:rows], memory[1 : rows + 1], memory[::2][:rows]):
                with poisoned_memory():
                    found = group_rows(index)
                expected = row_groups._group_by_sorting(index)
                for ours, theirs in zip(found, expected, strict=True):
                    assert ours.dtype == theirs.dtype
                    assert torch.equal(ours, theirs)
    assert launched == ([rows] * 24 if rows <= 128 else [])
    compiled = torch.compile(group_rows, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    assert torch.equal(compiled(index).order, expected.order)
    assert len(launched) == (25 if rows <= 128 else 0)
    torch.library.opcheck(row_groups._group_rows, (index,))


@pytest.mark.gpu
def test_a_capture_launches_no_kernel_for_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the graph is right, whichever way it was captured."""
    index = torch.zeros(5, dtype=torch.int32, device="cuda")
    monkeypatch.setattr(row_groups, "_LOADED", set())
    row_groups._group_by_sorting(index)
    for loaded in (False, True):
        graph = torch.cuda.CUDAGraph()
        if loaded:
            group_rows(index)
        with torch.cuda.graph(graph):
            groups = group_rows(index)
        assert bool(row_groups._LOADED) == loaded
        for chosen in ([3, -1, 3, 0, -1], [2, 2, 2, 2, 2], [4, 3, -1, 1, 0]):
            index.copy_(torch.tensor(chosen))
            for part in groups:
                part.fill_(-7)
            graph.replay()
            for ours, theirs in zip(groups, row_groups._group_by_sorting(torch.tensor(chosen)), strict=True):
                assert torch.equal(ours.cpu(), theirs)


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_groups_in_the_interpreter(slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(__file__, test_groups, test_comparing_and_sorting_group_alike, slow=slow)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("block", [16, 128])
def test_grouping_compiles_for_hopper(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from meswitch_kernels.triton_group_rows import _group_rows_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = ASTSource(
        fn=_group_rows_kernel,
        signature=dict.fromkeys(_group_rows_kernel.arg_names, "*i32") | {"rows": "i32", "BLOCK": "constexpr"},
        constexprs={(_group_rows_kernel.arg_names.index("BLOCK"),): block},
    )
    options = {"num_warps": 8 if block > 16 else 1}
    assert ".target sm_90" in compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def test_columns_are_those_that_the_kernels_read() -> None:
    assert COLUMNS[6:] == ("bits", "salient_channels", "row_bytes")
