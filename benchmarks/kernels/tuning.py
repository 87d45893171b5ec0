"""A search for the sizes of blocks: all of a grid, compiled side by side and timed on each shape."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import get_args
from unittest import mock

import torch

from benchmarks.kernels.cases import DOWN, GATE, GATE_UP, KEY, OUT, QKV, Case, Launch, Layers, call_once, measure
from meswitch_kernels import Numerics, linear
from meswitch_kernels.configurations import Configuration, Key, Kind

__all__ = ["add_arguments", "grid", "tune"]

_SHAPES = {"qkv": QKV, "k": KEY, "o": OUT, "gate_up": GATE_UP, "gate": GATE, "down": DOWN}
#: Rows over experts, of linears. Sizes are for all of a kind, since a graph does not know which it will meet.
_ROWS: dict[Kind, tuple[tuple[int, int], ...]] = {
    "fused": ((1, 1),),
    "single": ((1, 1), (16, 16)),
    "several": ((2, 1), (4, 1), (16, 1), (16, 2), (16, 4), (16, 8)),
}
_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--kind", choices=list(_ROWS), action="append", help="default: all")
    parser.add_argument("--shape", choices=sorted(_SHAPES), action="append", help="default: all")
    parser.add_argument("--numerics", choices=get_args(Numerics), action="append", help="default: int16")
    parser.add_argument("--bits", type=int, default=2)


def tune(args: argparse.Namespace) -> None:
    """Print lines of the table of sizes for each shape, the best first, with the time of each case."""
    spawn = multiprocessing.get_context("spawn")
    kinds: list[Kind] = args.kind or list(_ROWS)
    names: list[Numerics] = args.numerics or ["int16"]
    shapes = [_SHAPES[name] for name in args.shape or _SHAPES]
    with ProcessPoolExecutor(max(1, min(30, (os.cpu_count() or 1) - 2)), mp_context=spawn) as compilers:
        for kind, numerics in itertools.product(kinds, names):
            _tune_kernel(kind, numerics, [_cases(kind, shape, args.bits, numerics) for shape in shapes], compilers)


def grid(kind: Kind) -> Iterator[Configuration]:
    """The sizes that are tried: around those that were the fastest on an H200 among many more."""
    default = Configuration()
    if kind == "fused":
        for (block_out, warps, block_codes), block_in, stages in itertools.product(
            ((8, 2, 2048), (8, 4, 2048), (16, 4, 1024), (32, 8, 1024)), (256, 512), (2, 3, 4)
        ):
            yield replace(
                default, block_out=block_out, warps=warps, block_codes=block_codes, block_in=block_in, stages=stages
            )
    elif kind == "single":
        for (block_out, warps), programs in itertools.product(((16, 2), (32, 4), (64, 8)), (4, 5, 6, 8, 10, 12)):
            # Groups of several rows, of which there are none here, are compiled with these sizes, too.
            yield replace(default, block_out=block_out, warps=warps, sharers=min(4, warps), programs=programs)
    else:
        for (block_out, warps, sharers), registers in itertools.product(
            ((32, 4, 4), (32, 8, 8), (64, 4, 2), (64, 8, 4)), (128, 168)
        ):
            # As many programs as by their registers share a multiprocessor.
            programs = 2048 // (registers * warps)
            yield replace(
                default,
                block_out=block_out,
                warps=warps,
                sharers=sharers,
                max_registers=registers,
                programs=programs,
            )


def _cases(kind: Kind, shape: tuple[int, int], bits: int, numerics: Numerics) -> list[Case]:
    launch: Launch = "fused" if kind == "fused" else "delta"
    return [
        Case(shape, tuple(row % experts for row in range(rows)), bits, launch, numerics)
        for rows, experts in _ROWS[kind]
    ]


def _tune_kernel(kind: Kind, numerics: Numerics, shapes: list[list[Case]], compilers: ProcessPoolExecutor) -> None:
    candidates = list(grid(kind))
    # Compilers take seconds, and there are more cores than one; the timings that follow have the device alone. How
    # many programs there are is not compiled.
    kernels = dict.fromkeys(replace(sizes, programs=0) for sizes in candidates)
    first = shapes[0][-1]
    reasons = dict(zip(kernels, compilers.map(_compiles, [first] * len(kernels), kernels), strict=True))
    for sizes, reason in reasons.items():
        if reason is not None:
            print(f"# {sizes!r}: {reason}", flush=True)
    candidates = [sizes for sizes in candidates if reasons[replace(sizes, programs=0)] is None]
    for cases in shapes:
        times: dict[Configuration, list[float]] = {sizes: [] for sizes in candidates}
        for case in cases:
            layers = Layers(case.shape, case.experts, case.bits, with_base=kind == "fused")
            for sizes in candidates:
                times[sizes].append(_time(case, layers, sizes))
            del layers
            torch.cuda.empty_cache()
        for sizes in _ranked(times)[:_SHOWN]:
            key = Key(kind, numerics, *cases[0].shape)
            shown = ", ".join(f"{microseconds:.1f}" for microseconds in times[sizes])
            print(f"{key!r}: {sizes!r},  # {shown} µs", flush=True)


def _ranked(times: dict[Configuration, list[float]]) -> list[Configuration]:
    """The sizes by the geometric mean of their times, best first.

    >>> small, large = Configuration(), Configuration(block_out=32)
    >>> _ranked({small: [2.0, 8.0], large: [3.0, 5.0]}) == [large, small]
    True
    """
    return sorted(times, key=lambda sizes: math.prod(times[sizes]))


def _time(case: Case, layers: Layers, sizes: Configuration) -> float:
    """Microseconds, infinite for sizes that do not fit."""
    with mock.patch.object(linear, "configuration", return_value=sizes):
        try:
            return measure(case, layers)
        except Exception as reason:
            print(f"# {sizes!r}: {_first_line(reason)}", flush=True)
            return float("inf")


def _compiles(case: Case, sizes: Configuration) -> str | None:
    """Compile and run a kernel in this process, so that others find it in Triton's cache; what went wrong, if any."""
    with mock.patch.object(linear, "configuration", return_value=replace(sizes, programs=1)):
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
