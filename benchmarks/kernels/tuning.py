"""A search for the sizes of blocks: one knob after the other, from where the last one was best."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.cases import Case, Layers, measure
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
    parser.add_argument("--rounds", type=int, default=2, help="how often to go through the knobs")


def tune(args: argparse.Namespace) -> None:
    """Print a line of the table of sizes for each case, with what it took and what the present sizes take."""
    for shape in (_SHAPES[name] for name in args.shape or _SHAPES):
        for kind in args.kind or ("delta", "fused"):
            for rows in args.rows or (1, 16):
                experts = args.experts or (rows if kind == "delta" else 1)
                layers = Layers(shape, experts, args.bits, with_base=kind == "fused")
                for numerics in args.numerics or ("int8",):
                    index = tuple(row % experts for row in range(rows))
                    _tune_case(Case(shape, index, args.bits, kind, numerics), layers, args.rounds)
                del layers
                torch.cuda.empty_cache()


def _tune_case(case: Case, layers: Layers, rounds: int) -> None:
    key = Key(case.launch, case.numerics, len(case.index) > 1, *case.shape)  # type: ignore[arg-type]
    sizes = configuration(key, torch.device("cuda", torch.cuda.current_device()))
    start = best = _time(case, layers, sizes)
    tried = {sizes}
    for _ in range(rounds):
        before = sizes
        for knob, (values, kinds) in _KNOBS.items():
            candidates = [replace(sizes, **{knob: value}) for value in values] if case.launch in kinds else []
            for candidate in candidates:
                # Tensor cores take no fewer output channels.
                if candidate in tried or (candidate.block_out < 16 and len(case.index) > 1):
                    continue
                tried.add(candidate)
                took = _time(case, layers, candidate)
                if took < best:
                    sizes, best = candidate, took
        if sizes == before:
            break
    print(f"{key!r}: {sizes!r},  # {best:.1f} µs, was {start:.1f}", flush=True)


def _time(case: Case, layers: Layers, sizes: Configuration) -> float:
    """Microseconds, infinite for sizes that do not compile or do not fit."""

    def chosen(*_: Any) -> Configuration:
        return sizes

    with mock.patch.object(linear, "configuration", chosen):
        try:
            return measure(case, layers)
        except Exception as reason:
            print(f"# {sizes!r}: {type(reason).__name__}: {str(reason).splitlines()[:1]}", flush=True)
            return float("inf")
