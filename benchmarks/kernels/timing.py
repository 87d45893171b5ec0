"""Device time of a call inside a CUDA graph, over data that the cache does not hold."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["copies_beyond_cache", "copy_bandwidth", "device_microseconds", "read_bandwidth"]

_REPLAYS = 25


def copies_beyond_cache(size: int) -> int:
    """Copies of so many bytes to go round, so that each has left the cache when its turn comes again."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(2, -(-4 * cache // size))


def device_microseconds(calls: Sequence[Callable[[], Any]], calls_in_graph: int = 8) -> float:
    """Median time of one of the calls, which a graph runs one after the other.

    Args:
        calls: the same work on copies of its data.
        calls_in_graph: how many to run, at least about: each as often as the others.
    """
    calls = list(calls) * max(1, calls_in_graph // len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
    for _ in range(3):
        graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
    return statistics.median(times) * 1e3 / len(calls)


@triton.jit
def _read_kernel(data, sums, elements, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for begin in range(tl.program_id(0) * BLOCK, elements, tl.num_programs(0) * BLOCK):
        total += tl.load(data + begin + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def read_bandwidth() -> float:
    """Bytes a second at which the device reads its memory, the most that any kernel here could do."""
    elements = 1 << 28
    data = torch.randint(0, 1 << 20, (elements,), dtype=torch.int32, device="cuda")
    programs = torch.cuda.get_device_properties().multi_processor_count * 16
    sums = torch.empty(programs, dtype=torch.int32, device="cuda")

    def read() -> None:
        _read_kernel[(programs,)](data, sums, elements, BLOCK=4096, num_warps=8)

    return elements * 4 / (device_microseconds([read]) * 1e-6)


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, at which the device copies."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (device_microseconds([lambda: target.copy_(source)]) * 1e-6)
