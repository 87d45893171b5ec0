"""Weights that are written out: an expert merged into a weight, and the linears of a layer over a long prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.kernels.cases import DOWN, GATE_UP, OUT, QKV, Case, random_leaves
from benchmarks.kernels.timing import copies_beyond_cache, copy_bandwidth, device_microseconds
from benchmarks.timing import attempt
from meswitch_kernels import (
    DeltaLeaves,
    ExpertTable,
    PrefillLayer,
    ScratchRing,
    add_delta,
    add_delta_reference,
    prefill_linear,
)

__all__ = ["DENSE_SECTIONS", "WrittenLinear", "merge_microseconds"]

#: The linears of a layer of Mistral-7B, in the order in which they run.
_LAYER = (QKV, OUT, GATE_UP, DOWN)
_NAMES = {QKV: "qkv", OUT: "o", GATE_UP: "gate_up", DOWN: "down"}
_LAYERS = 4
#: Launches by way of scratch memory, and what they tell :func:`~meswitch_kernels.prefill_linear`.
_SCRATCH: dict[str, dict[str, Any]] = {
    "scratch": {"chunk_bytes": None, "ahead": False},
    "scratch, ahead": {"chunk_bytes": None},
    "scratch, ahead, 256 programs": {"chunk_bytes": None, "programs": 256},
}
for _size in (8, 16, 32):
    _SCRATCH[f"{_size} MiB"] = {"chunk_bytes": _size << 20, "ahead": False}
    _SCRATCH[f"{_size} MiB, ahead"] = {"chunk_bytes": _size << 20}
#: Of an output in bfloat16, relative: about three times what its rounding alone makes.
_MOST_ERROR = 5e-3

Row = dict[str, Any]


@dataclass
class WrittenLinear:
    """A random linear with a random expert.

    Attributes:
        shape: output and input channels.
        bits: bits of a code.
        device: where it is.
    """

    shape: tuple[int, int]
    bits: int = 2
    device: str = "cuda"
    weight: torch.Tensor = field(init=False)
    leaves: DeltaLeaves = field(init=False)
    table: ExpertTable = field(init=False)

    def __post_init__(self) -> None:
        out, width = self.shape
        self.weight = torch.randn(out, width, device=self.device, dtype=torch.bfloat16) * 0.02
        self.leaves = random_leaves(out, width, self.bits, self.device)
        self.table = ExpertTable(1, out, width, self.device)
        self.table.set(0, self.leaves)
        self._salient = self.leaves.salient_index.long()
        # The reference finds these each time, for which the host waits; a graph cannot.
        channels = torch.arange(width, device=self.device)
        self._coded = channels[torch.isin(channels, self._salient, invert=True)]

    @property
    def bytes(self) -> int:
        """Bytes that are read and written to merge the expert."""
        out, width = self.shape
        return 4 * out * width + Case(self.shape, (0,), self.bits, "delta").delta_bytes

    def merge(self, out: torch.Tensor) -> torch.Tensor:
        return add_delta(self.weight, self.table.rows, 0, out=out)

    def merge_with_torch(self, out: torch.Tensor) -> torch.Tensor:
        """The peer, which reads and writes intermediate results; of numbers of bits that divide 8."""
        leaves = self.leaves
        shifts = torch.arange(0, 8, leaves.bits, device=self.device, dtype=torch.uint8)
        codes = (leaves.codes[:, :, None] >> shifts & 2**leaves.bits - 1).flatten(1)[:, : len(self._coded)]
        delta = torch.empty(self.shape, device=self.device)
        delta.index_copy_(1, self._coded, (codes.float() - (2**leaves.bits - 1) / 2) * leaves.step[:, None])
        delta.index_copy_(1, self._salient, leaves.salient.float())
        return torch.add(self.weight, delta, out=out)

    def check(self) -> None:
        """The kernel's bits are torch's."""
        ours, torchs = (torch.full_like(self.weight, float("nan")) for _ in range(2))
        add_delta_reference(self.weight, self.leaves, torchs)
        if not torch.equal(self.merge(ours), torchs):
            raise ArithmeticError("the merged weight is not what torch makes of it")


def merge_microseconds(linears: list[WrittenLinear], merge: Callable[[WrittenLinear, torch.Tensor], Any]) -> float:
    """Median device time of merging one of the linears into memory of its own."""
    results = [torch.empty_like(linear.weight) for linear in linears]
    return device_microseconds([lambda pair=pair: merge(*pair) for pair in zip(linears, results, strict=True)])


def _merge_rows() -> Iterator[Row]:
    bandwidth = copy_bandwidth()
    for shape, bits in ((GATE_UP, 2), (DOWN, 2), (OUT, 2), (GATE_UP, 1), (GATE_UP, 3), (GATE_UP, 4)):
        linears = [WrittenLinear(shape, bits) for _ in range(copies_beyond_cache(4 * shape[0] * shape[1]))]
        what = f"{_NAMES[shape]} {shape[0]}×{shape[1]}, {bits} bit, one expert merged"
        launches = [("merge", WrittenLinear.merge), ("dense", WrittenLinear.merge_with_torch)]
        for launch, merge in launches if 8 % bits == 0 else launches[:1]:

            def measured(linears: list[WrittenLinear] = linears, merge: Any = merge) -> Row:
                linears[0].check()
                microseconds = merge_microseconds(linears, merge)
                size = linears[0].bytes
                share = size / bandwidth / (microseconds * 1e-6)
                return {"microseconds": microseconds, "bytes": size, "share_of_limit": share}

            yield attempt({"what": what, "launch": launch}, measured)
            del measured
        del linears
        torch.cuda.empty_cache()


def _prefill_rows() -> Iterator[Row]:
    layers = [[WrittenLinear(shape) for shape in _LAYER] for _ in range(_LAYERS)]
    for rows in (2048, 8192):
        for place, shape in enumerate(_LAYER):
            what = f"{_NAMES[shape]} {shape[0]}×{shape[1]}, 2 bit, {rows} rows"
            by_scratch = [launch for launch, options in _SCRATCH.items() if not options.get("ahead", True)]
            yield from _launches(what, [layer[place] for layer in layers], rows, ["linear", *by_scratch])
        what = f"qkv, o, gate_up and down, 2 bit, {rows} rows"
        chain = [linear for layer in layers for linear in layer]
        for row in _launches(what, chain, rows, ["linear", "dense", *_SCRATCH]):
            # Of one layer, not of one linear.
            yield {**row, "microseconds": row["microseconds"] * len(_LAYER)} if "microseconds" in row else row


def _launches(what: str, linears: list[WrittenLinear], rows: int, launches: list[str]) -> Iterator[Row]:
    inputs = {
        shape: torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        for shape in {linear.shape for linear in linears}
    }
    for launch in launches:

        def measured(launch: str = launch) -> Row:
            run = _chain(launch, linears, inputs)
            _check_chain(launch, linears[0], inputs)
            # All of them in one call, since each announces the next.
            return {"microseconds": device_microseconds([run], calls_in_graph=2) / len(linears)}

        yield attempt({"what": what, "launch": launch}, measured)
        torch.cuda.empty_cache()


def _chain(
    launch: str, linears: list[WrittenLinear], inputs: dict[tuple[int, int], torch.Tensor], device: str = "cuda"
) -> Callable[[], torch.Tensor]:
    """The linears one after the other, each of inputs that were there before; the last one's output."""
    ring = ScratchRing(device)
    layers = [PrefillLayer(linear.weight, linear.table.rows) for linear in linears]

    def run() -> torch.Tensor:
        y = torch.empty(0)
        for linear, layer, after in zip(linears, layers, [*layers[1:], None], strict=True):
            x = inputs[linear.shape]
            if launch == "linear":
                y = F.linear(x, linear.weight)
            elif launch == "dense":
                y = F.linear(x, linear.merge_with_torch(torch.empty_like(linear.weight)))
            else:
                then = None if after is None else (after, 0)
                y = prefill_linear(x, layer, [(0, None)], ring, then=then, **_SCRATCH[launch])
        return y

    return run


def _check_chain(
    launch: str, linear: WrittenLinear, inputs: dict[tuple[int, int], torch.Tensor], device: str = "cuda"
) -> None:
    """The output is that of the reference's weight in float32, but for rounding; matmuls of chunks round otherwise."""
    if launch == "linear":
        return
    y = _chain(launch, [linear, linear], inputs, device)()
    weight = torch.empty_like(linear.weight)
    add_delta_reference(linear.weight, linear.leaves, weight)
    expected = F.linear(inputs[linear.shape].float(), weight.float())
    error = float((y - expected).norm() / expected.norm())
    # A NaN is no small error either.
    if not error < _MOST_ERROR:
        raise ArithmeticError(f"the output is not that of the reference's weight: relative error {error:.4f}")


DENSE_SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {"merge": _merge_rows, "prefill": _prefill_rows}
