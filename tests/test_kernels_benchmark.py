"""The kernels benchmark, without a GPU: its cases, its count of bytes, its table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels import dense_cases, tuning
from benchmarks.kernels.__main__ import add_ratios, default_output, render
from benchmarks.kernels.cases import SECTIONS, Case, _zipf
from benchmarks.kernels.dense_cases import WrittenLinear, _chain, _check_chain
from meswitch_kernels import add_delta_reference, prefill
from meswitch_kernels.configurations import Configuration, Key


def test_bytes_are_those_of_the_delta_format() -> None:
    case = Case((4096, 14336), (0,), 2, "delta", "int8")
    # As docs/delta_format.md counts this layer, but for the 16 salient indices.
    assert case.delta_bytes == 14811200 - 16 * 4
    assert case.bytes == case.delta_bytes + 2 * (14336 + 4096) + 2 * 4096
    assert Case((4096, 14336), (0, 1, 1), 2, "delta", "int8").delta_bytes == 2 * case.delta_bytes
    assert Case((4096, 14336), (0,), 2, "linear").bytes == 2 * (4096 * 14336 + 14336 + 4096)


@pytest.mark.parametrize("section", SECTIONS)
def test_cases(section: str) -> None:
    cases = list(SECTIONS[section]())
    assert len(set(cases)) == len(cases)
    assert {len(case.index) for case in cases} <= {1, 2, 4, 8, 16}
    linears = {case.what for case in cases if case.launch == "linear"}
    assert {case.what for case in cases if case.launch == "fused"} <= linears


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_peer_merges_what_the_kernel_does(bits: int) -> None:
    linear = WrittenLinear((8, 50), bits, "cpu")
    linear.check()
    expected = torch.empty_like(linear.weight)
    add_delta_reference(linear.weight, linear.leaves, expected)
    assert torch.equal(linear.merge_with_torch(torch.empty_like(expected)), expected)
    assert WrittenLinear((4096, 4096), bits, "cpu").bytes == 4 * 4096**2 + 4096 * (4080 * bits // 8 + 4 + 32)


def test_chains_of_linears_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = WrittenLinear((8, 50), 2, "cpu")
    inputs = {linear.shape: torch.randn(3, 50).bfloat16()}
    for launch in ("linear", "dense", *dense_cases._SCRATCH):
        _check_chain(launch, linear, inputs, "cpu")
    plain = _chain("linear", [linear], inputs, "cpu")()
    assert torch.equal(plain, torch.nn.functional.linear(inputs[linear.shape], linear.weight))
    assert not torch.equal(plain, _chain("16 MiB, ahead", [linear], inputs, "cpu")())

    # Of two chunks, the second of which is made wrong.
    large = WrittenLinear((512, 12288), 2, "cpu")
    inputs = {large.shape: torch.randn(3, 12288).bfloat16()}
    monkeypatch.setattr(prefill, "_CHUNK_PRODUCTS", 1)
    _check_chain("8 MiB, ahead", large, inputs, "cpu")
    write = prefill.write_sum
    monkeypatch.setattr(prefill, "write_sum", lambda *arguments: write(*arguments[:6], 0, *arguments[7:]))
    _check_chain("scratch", large, inputs, "cpu")
    with pytest.raises(ArithmeticError, match="relative error"):
        _check_chain("8 MiB, ahead", large, inputs, "cpu")


def test_zipf_leaves_no_expert_out() -> None:
    index = _zipf(16, 8)
    assert len(index) == 16
    assert set(index) == set(range(8))
    assert index.count(0) > index.count(7)


def test_table() -> None:
    timed = {"bytes": 1, "delta_bytes": 1, "delta_tb_per_second": 2.5, "share_of_limit": 0.9}
    fused = {"what": "o", "launch": "fused", "numerics": "int8", "microseconds": 19.0, "error": 0.007}
    rows = [
        {"section": "a", "what": "o", "launch": "linear", "microseconds": 20.0, **timed},
        {"section": "a", **fused, **timed},
        {"section": "b", "what": "o", "launch": "delta", "numerics": "int8", "unavailable": "Error: no\nmore"},
        {"section": "c", "what": "p", "launch": "ahead", "microseconds": 30.0},
    ]
    add_ratios(rows)
    assert render(rows).splitlines()[2:] == [
        "| o | linear |  | 20.0 |  | 0.90 | 1.000 |  |",
        "| o | fused | int8 | 19.0 |  | 0.90 | 0.950 | 0.0070 |",
        "| o | delta | int8 | unavailable: Error: no | | | | |",
        "| p | ahead |  | 30.0 |  |  |  |  |",
    ]
    assert default_output("NVIDIA H100 80GB HBM3").name == "kernels_nvidia-h100-80gb-hbm3.json"


class _NoCompilers:
    """Compiles nothing; sizes with the fewest channels do not compile."""

    def map(self, _: Any, cases: list[Case], candidates: Any) -> list[str | None]:
        assert len(cases) == len(candidates)
        least = min(candidate.block_out for candidate in candidates)
        return ["too large" if candidate.block_out == least else None for candidate in candidates]


@pytest.mark.parametrize("kind", ["fused", "single", "several"])
def test_the_search_finds_the_best_sizes(
    kind: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sizes that are best by all cases together, of those that compile; first in what is printed."""
    sizes = list(tuning.grid(kind))
    best, least = sizes[-1], min(candidate.block_out for candidate in sizes)
    cases = tuning._cases(kind, (4096, 4096), 2, "int16")

    def time(case: Case, layers: Any, sizes: Configuration) -> float:
        assert sizes.block_out != least
        # Others are a little better in one case, and much worse in another.
        return 10.0 if sizes == best else 9.0 if case.experts == 1 and kind != "fused" else 20.0

    monkeypatch.setattr(tuning, "_time", time)
    monkeypatch.setattr(tuning, "Layers", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tuning._tune_kernel(kind, "int16", [cases], _NoCompilers())  # type: ignore[arg-type]
    printed = capsys.readouterr().out.splitlines()
    assert any("too large" in line for line in printed)
    times = ", ".join(["10.0"] * len(cases))
    chosen = next(line for line in printed if not line.startswith("#"))
    assert chosen == f"{Key(kind, 'int16', 4096, 4096)!r}: {best!r},  # {times} µs"


def test_the_grids_have_sizes_that_the_kernels_take() -> None:
    for kind in ("fused", "single", "several"):
        sizes = list(tuning.grid(kind))
        assert len(sizes) == len(set(sizes))
        assert all(512 <= candidate.block_codes <= 2048 for candidate in sizes)
        if kind != "fused":
            assert all(candidate.warps % candidate.sharers == 0 for candidate in sizes)
            assert all(candidate.block_out >= 16 * candidate.warps // candidate.sharers for candidate in sizes)
