"""A search for the sizes of blocks: all that differ in one knob from the best so far, and the better ones together."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.cases import Case, Layers, call_once, measure
from meswitch_kernels import linear
from meswitch_kernels.configurations import Configuration, Key, configuration

__all__ = ["add_arguments", "tune"]

_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
#: Values of each knob, and the kinds of kernel that it matters to.
_KNOBS: dict[str, tuple[tuple[int | None, ...], tuple[str, ...]]] = {
    "block_out": ((4, 8, 16, 32, 64, 128), ("delta", "fused")),
    "warps": ((1, 2, 4, 8), ("delta", "fused")),
    "block_in": ((64, 128, 256, 512, 1024), ("fused",)),
    "block_codes": ((512, 1024, 2048), ("delta", "fused")),
    "unroll": ((1, 2, 4), ("delta", "fused")),
    "stages": ((1, 2, 3, 4), ("delta", "fused")),
    "programs": ((2, 4, 8, 16, 32, 1024), ("delta",)),
    "max_registers": ((None, 96, 128, 168), ("delta", "fused")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--kind", choices=("delta", "fused"), action="append", help="default: both")
    parser.add_argument("--shape", choices=sorted(_SHAPES), action="append", help="default: all")
    parser.add_argument("--numerics", choices=("exact", "int8", "int16"), action="append", help="default: int8")
    parser.add_argument("--rows", type=int, choices=(1, 2, 4, 8, 16), action="append", help="default: 1 and 16")
    parser.add_argument("--experts", type=int, help="of the rows; default: as many for delta, one for fused")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often to look around, at most")


def tune(args: argparse.Namespace) -> None:
    """Print a line of the table of sizes for each case, with what it took and what the present sizes take."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(16, (os.cpu_count() or 1) - 2)), mp_context=spawn) as compilers:
        for shape in (_SHAPES[name] for name in args.shape or _SHAPES):
            for kind in args.kind or ("delta", "fused"):
                for rows in args.rows or (1, 16):
                    experts = args.experts or (rows if kind == "delta" else 1)
                    layers = Layers(shape, experts, args.bits, with_base=kind == "fused")
                    for numerics in args.numerics or ("int8",):
                        index = tuple(row % experts for row in range(rows))
                        _tune_case(Case(shape, index, args.bits, kind, numerics), layers, args.rounds, compilers)
                    del layers
                    torch.cuda.empty_cache()


def _tune_case(case: Case, layers: Layers, rounds: int, compilers: ProcessPoolExecutor) -> None:
    key = Key(case.launch, case.numerics, len(case.index) > 1, *case.shape)  # type: ignore[arg-type]
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = configuration(key, device)
    times = {sizes: _time(case, layers, sizes)}
    start = times[sizes]
    for _ in range(rounds):
        neighbours = [candidate for candidate in _neighbours(case, sizes) if candidate not in times]
        # Compilers take seconds, and there are more cores than one; the timings that follow have the device alone.
        works = compilers.map(_compiles, [case] * len(neighbours), neighbours)
        for candidate, reason in zip(neighbours, works, strict=True):
            times[candidate] = _time(case, layers, candidate) if reason is None else float("inf")
            if reason is not None:
                print(f"# {candidate!r}: {reason}", flush=True)
        together = _combined(sizes, times)
        if together not in times:
            times[together] = _time(case, layers, together)
        best = min(times, key=lambda found: times[found])
        if best == sizes:
            break
        sizes = best
    print(f"{key!r}: {sizes!r},  # {times[sizes]:.1f} µs, was {start:.1f}", flush=True)


def _neighbours(case: Case, sizes: Configuration) -> list[Configuration]:
    """Sizes that differ in one knob."""
    found = []
    for knob, (values, kinds) in _KNOBS.items():
        if case.launch in kinds:
            found += [replace(sizes, **{knob: value}) for value in values if value != getattr(sizes, knob)]
    # Tensor cores take no fewer output channels.
    return [candidate for candidate in found if candidate.block_out >= 16 or len(case.index) == 1]


def _combined(sizes: Configuration, times: Mapping[Configuration, float]) -> Configuration:
    """All knobs together that were better one by one, each at its best.

    >>> start = Configuration()
    >>> times = {start: 3.0, replace(start, warps=8): 2.0}
    >>> times |= {replace(start, unroll=2): 1.0, replace(start, unroll=4): 2.5}
    >>> _combined(start, times) == replace(start, warps=8, unroll=2)
    True
    """
    better: dict[str, Any] = {}
    for knob in _KNOBS:
        alone = {value: times.get(replace(sizes, **{knob: value}), float("inf")) for value in _KNOBS[knob][0]}
        value = min(alone, key=lambda found: alone[found])
        if alone[value] < times[sizes]:
            better[knob] = value
    return replace(sizes, **better)


def _time(case: Case, layers: Layers, sizes: Configuration) -> float:
    """Microseconds, infinite for sizes that do not compile or do not fit."""
    with mock.patch.object(linear, "configuration", return_value=sizes):
        try:
            return measure(case, layers)
        except Exception as reason:
            print(f"# {sizes!r}: {_first_line(reason)}", flush=True)
            return float("inf")


def _compiles(case: Case, sizes: Configuration) -> str | None:
    """Compile and run a kernel in this process, so that others find it in Triton's cache; what went wrong, if any."""
    with mock.patch.object(linear, "configuration", return_value=sizes):
        try:
            call_once(case, _layers(case))
        except Exception as reason:
            return _first_line(reason)
    return None


@functools.lru_cache(maxsize=1)
def _layers(case: Case) -> Layers:
    return Layers(case.shape, case.experts, case.bits, with_base=case.launch == "fused", copies=1)


def _first_line(reason: Exception) -> str:
    return f"{type(reason).__name__}: {str(reason).splitlines()[:1]}"
