"""A search for the sizes of blocks with which a merged weight is written."""

from __future__ import annotations

import itertools

import torch

from benchmarks.kernels.cases import DOWN, GATE_UP, OUT
from benchmarks.kernels.dense_cases import WrittenLinear, merge_microseconds
from benchmarks.kernels.timing import copies_beyond_cache, copy_bandwidth
from meswitch_kernels.triton_add_delta import AddSizes, add_delta_triton

__all__ = ["tune_merge"]


def tune_merge() -> None:
    """Print what the sizes take and their share of a copy, the best ones last."""
    bandwidth = copy_bandwidth()
    for shape in (GATE_UP, DOWN, OUT):
        linears = [WrittenLinear(shape) for _ in range(copies_beyond_cache(4 * shape[0] * shape[1]))]
        found = []
        for sizes in itertools.starmap(AddSizes, itertools.product((4, 8, 16), (256, 512), (1, 2, 4, 8), (4, 8))):

            def merge(linear: WrittenLinear, out: torch.Tensor, sizes: AddSizes = sizes) -> None:
                add_delta_triton(out, linear.weight, None, None, linear.table.rows, None, sizes=sizes)

            found.append((merge_microseconds(linears, merge), sizes))
        for microseconds, sizes in sorted(found, key=lambda pair: pair[0], reverse=True):
            share = linears[0].bytes / bandwidth / (microseconds * 1e-6)
            print(f"{shape[0]}×{shape[1]} {sizes!r}: {microseconds:.1f} µs, {share:.3f} of a copy", flush=True)
        del linears
        torch.cuda.empty_cache()
