"""What is measured: a linear's shape, a batch's rows over experts, bits, numerics and the launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from benchmarks.kernels.timing import copies_beyond_cache, device_microseconds
from meswitch_kernels import (
    DeltaLeaves,
    ExpertTable,
    Numerics,
    RowGroups,
    align_rows,
    delta_linear,
    dequantize_delta,
    fused_linear,
    group_rows,
)

__all__ = [
    "DOWN",
    "GATE",
    "GATE_UP",
    "KEY",
    "OUT",
    "QKV",
    "SECTIONS",
    "Case",
    "Layers",
    "call_once",
    "error",
    "measure",
    "random_leaves",
]

#: ``delta`` over the base's output; ``fused`` with its matmul, in one kernel if of one row; ``both``: the base's
#: ``F.linear``, then the delta.
#: Peers: ``linear``, the base alone, and ``dense``, the base, each expert's dense delta written and multiplied.
Launch = Literal["delta", "fused", "both", "linear", "dense"]

#: Linears of Mistral-7B, fused where a kernel may fuse them, and those that models have apart.
QKV, OUT, GATE_UP, DOWN = (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)
KEY, GATE = (1024, 4096), (14336, 4096)
_NAMES = {QKV: "qkv", OUT: "o", GATE_UP: "gate_up", DOWN: "down", KEY: "k or v", GATE: "gate or up"}
_NUMERICS: tuple[Numerics, ...] = ("int8", "int16", "exact")
_SALIENT_CHANNELS = 16


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        shape: output and input channels.
        index: the expert of each row.
        bits: bits of a code.
        launch: what is called.
        numerics: of the delta; peers have none.
    """

    shape: tuple[int, int]
    index: tuple[int, ...]
    bits: int
    launch: Launch
    numerics: Numerics = "exact"

    @property
    def experts(self) -> int:
        return len(set(self.index))

    @property
    def what(self) -> str:
        rows = f"{len(self.index)} rows, {self.experts} experts" if self.experts > 1 else f"{len(self.index)} rows"
        out, width = self.shape
        return f"{_NAMES[self.shape]} {out}×{width}, {self.bits} bit, {rows}"

    @property
    def delta_bytes(self) -> int:
        """Bytes of the deltas that have to be read: codes, steps and salient channels."""
        out, width = self.shape
        coded = width - _SALIENT_CHANNELS
        return self.experts * out * (-(-coded * self.bits // 8) + 4 + 2 * _SALIENT_CHANNELS)

    @property
    def bytes(self) -> int:
        """Bytes that have to be read or written: deltas, the base's weight, activations and results."""
        out, width = self.shape
        activations = 2 * len(self.index) * (width + out)
        delta = 0 if self.launch == "linear" else self.delta_bytes
        base = 2 * len(self.index) * out if self.launch == "delta" else 2 * out * width
        return activations + delta + base


def _zipf(rows: int, experts: int) -> tuple[int, ...]:
    """Rows in proportion to 1 / rank, each expert at least one."""
    weights = [1 / (rank + 1) for rank in range(experts)]
    counts = [max(1, round(rows * weight / sum(weights))) for weight in weights]
    counts[0] += rows - sum(counts)
    return tuple(expert for expert, count in enumerate(counts) for _ in range(count))


def _distinct() -> Iterator[Case]:
    for shape in (GATE_UP, DOWN, OUT):
        yield Case(shape, tuple(range(16)), 2, "dense")
        for numerics in _NUMERICS:
            yield Case(shape, tuple(range(16)), 2, "delta", numerics)


def _shared() -> Iterator[Case]:
    for shape in (GATE_UP, DOWN, OUT):
        for experts in (1, 2, 4, 8):
            for numerics in _NUMERICS[1:]:
                yield Case(shape, tuple(row % experts for row in range(16)), 2, "delta", numerics)
        for numerics in _NUMERICS[1:]:
            yield Case(shape, _zipf(16, 8), 2, "delta", numerics)


def _one_expert() -> Iterator[Case]:
    for shape in (QKV, OUT, GATE_UP, DOWN):
        for rows in (1, 2, 4, 8, 16):
            index = (0,) * rows
            yield Case(shape, index, 2, "linear")
            if rows in (1, 16):
                yield Case(shape, index, 2, "dense")
            for numerics in _NUMERICS:
                yield Case(shape, index, 2, "fused", numerics)
            if rows == 1:
                yield Case(shape, index, 2, "both", "int16")


def _bits() -> Iterator[Case]:
    for bits in (1, 3, 4):
        yield Case(GATE_UP, (0,), bits, "linear")
        for numerics in _NUMERICS:
            yield Case(GATE_UP, (0,), bits, "fused", numerics)
        for numerics in _NUMERICS:
            yield Case(GATE_UP, tuple(range(16)), bits, "delta", numerics)


SECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "distinct": _distinct,
    "shared": _shared,
    "one_expert": _one_expert,
    "bits": _bits,
}


class Layers:
    """Copies of a random layer with random deltas, by default as many as it takes to leave the cache."""

    def __init__(
        self, shape: tuple[int, int], experts: int, bits: int, with_base: bool, copies: int | None = None
    ) -> None:
        out, width = shape
        self.experts: list[list[DeltaLeaves]] = []
        self.tables: list[ExpertTable] = []
        self.weights: list[torch.Tensor] = []
        case = Case(shape, tuple(range(experts)), bits, "linear" if with_base else "delta")
        for _ in range(copies or copies_beyond_cache(2 * out * width if with_base else case.delta_bytes)):
            leaves = [random_leaves(out, width, bits) for _ in range(experts)]
            table = ExpertTable(experts, out, width, "cuda")
            for slot, expert in enumerate(leaves):
                table.set(slot, expert)
            self.experts.append(leaves)
            self.tables.append(table)
            if with_base:
                self.weights.append(torch.randn(out, width, device="cuda", dtype=torch.bfloat16) * 0.02)


def random_leaves(out: int, width: int, bits: int, device: str = "cuda") -> DeltaLeaves:
    """A delta with salient channels."""
    coded = width - _SALIENT_CHANNELS
    codes = torch.randint(0, 256, (out, -(-coded * bits // 8)), dtype=torch.uint8, device=device)
    return DeltaLeaves(
        codes=align_rows(codes),
        step=torch.rand(out, device=device) * 1e-3,
        bits=bits,
        salient_index=torch.randperm(width, device=device)[:_SALIENT_CHANNELS].sort().values.int(),
        salient=(torch.randn(out, _SALIENT_CHANNELS, device=device) * 1e-3).to(torch.bfloat16),
    )


def _inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, RowGroups]:
    """Activations, the base's output and the groups, which a model works out once a step for all its layers."""
    out, width = case.shape
    x = torch.randn(len(case.index), width, device="cuda", dtype=torch.bfloat16)
    base_out = torch.randn(len(case.index), out, device="cuda", dtype=torch.bfloat16)
    return x, base_out, group_rows(torch.tensor(case.index, device="cuda"))


def _dense(case: Case, leaves: list[DeltaLeaves], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Each expert's delta made dense and multiplied, in a loop: what there is without a kernel that reads codes."""
    for slot, expert in enumerate(leaves):
        rows = [row for row, chosen in enumerate(case.index) if chosen == slot]
        delta = _dense_delta(expert, case.shape[1], x.dtype)
        y[rows[0] : rows[-1] + 1] += F.linear(x[rows[0] : rows[-1] + 1], delta)
    return y


def _dense_delta(expert: DeltaLeaves, width: int, dtype: torch.dtype) -> torch.Tensor:
    return dequantize_delta(
        expert.codes,
        expert.step,
        expert.bits,
        width,
        salient_index=expert.salient_index,
        salient=expert.salient,
        dtype=dtype,
    )


def measure(case: Case, layers: Layers) -> float:
    """Microseconds of device time of one call."""
    return device_microseconds(_calls(case, layers))


def call_once(case: Case, layers: Layers) -> None:
    """Run a case on the first copy and wait for it."""
    _calls(case, layers)[0]()
    torch.cuda.synchronize()


def _calls(case: Case, layers: Layers) -> list[Callable[[], torch.Tensor]]:
    """A call a copy, on the same activations."""
    x, base_out, groups = _inputs(case)
    out = case.shape[0]

    def call(copy: int) -> torch.Tensor:
        rows = layers.tables[copy].rows
        if case.launch == "linear":
            return F.linear(x, layers.weights[copy])
        if case.launch == "dense":
            y = F.linear(x, layers.weights[copy]) if layers.weights else base_out
            return _dense(case, layers.experts[copy], x, y)
        if case.launch == "fused":
            return fused_linear(x, layers.weights[copy], None, rows, groups, numerics=case.numerics)
        y = F.linear(x, layers.weights[copy]) if case.launch == "both" else base_out
        return delta_linear(x, y, rows, groups, out_features=out, numerics=case.numerics)

    return [lambda copy=copy: call(copy) for copy in range(len(layers.tables))]


def error(case: Case, layers: Layers) -> float:
    """Error of the delta's own output in bfloat16 on random activations, relative to its norm, against float64.

    Rounding that output, which a model rounds once with the base's, is 0.0017 of it.
    """
    x, _, groups = _inputs(case)
    y = delta_linear(x, None, layers.tables[0].rows, groups, out_features=case.shape[0], numerics=case.numerics)
    row = len(case.index) - 1
    delta = _dense_delta(layers.experts[0][case.index[row]], case.shape[1], torch.float32)
    expected = delta.double() @ x[row].double()
    return float((y[row].double() - expected).norm() / expected.norm())
