"""One decode step of a model as a CUDA graph over a static cache, and how long its replay takes."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

__all__ = ["DecodeStep", "median_ms", "paired_ms"]

#: Tokens that the cache has room for; the step is taken behind half as many.
_SLOTS = 256
_REPEATS = 30


class DecodeStep:
    """A token of each row through the whole model, whose keys and values of earlier tokens are there.

    Every step takes the next place of the cache, so there is room for a hundred of them.

    Args:
        model: in evaluation mode.
        rows: of the batch.
        graph: whether to capture the step as a CUDA graph; else it is called.
        compiled: whether ``torch.compile`` makes it one graph of its own kernels first.
    """

    def __init__(self, model: PreTrainedModel, rows: int, *, graph: bool, compiled: bool = False) -> None:
        device, dtype = model.device, model.dtype
        self._model = model
        self._step: Callable[..., Any] = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        self._cache = StaticCache(config=model.config, max_cache_len=_SLOTS)
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._tokens = torch.randint(3, model.config.vocab_size, (rows, 1), device=device)
        self._positions = torch.full((rows, 1), _SLOTS // 2, device=device)
        self._mask = torch.zeros(rows, 1, 1, _SLOTS, dtype=dtype, device=device)
        self._mask[..., _SLOTS // 2 + 1 :] = torch.finfo(dtype).min
        self.logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():
            self._prefill(rows)
            if graph:
                self._capture()

    def _prefill(self, rows: int) -> None:
        """Fill half of the cache, a row at a time, with the keys and values of random tokens."""
        ids = torch.randint(3, self._model.config.vocab_size, (rows, _SLOTS // 2), device=self._tokens.device)
        self._model(ids, use_cache=True, **{self._cache_name: self._cache})

    def _call(self) -> None:
        self.logits = self._step(
            self._tokens,
            attention_mask=self._mask,
            position_ids=self._positions,
            use_cache=True,
            **{self._cache_name: self._cache},
        ).logits

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._call()
        self._graph = graph

    @torch.no_grad()
    def __call__(self) -> None:
        """Run the step once."""
        if self._graph is None:
            self._call()
        else:
            self._graph.replay()


def median_ms(action: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of a call, on the device's own clock where it has one."""
    for _ in range(3):
        action()
    return statistics.median(_milliseconds(action, device) for _ in range(_REPEATS))


def paired_ms(one: Callable[[], Any], other: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Median milliseconds of two calls that take turns, so that what slows a machine down slows both."""
    for _ in range(3):
        one()
        other()
    times = [(_milliseconds(one, device), _milliseconds(other, device)) for _ in range(_REPEATS)]
    return statistics.median(first for first, _ in times), statistics.median(second for _, second in times)


def _milliseconds(action: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        action()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)
