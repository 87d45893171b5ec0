"""Streams on which nothing runs until it has to, and then in any order that events allow."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

__all__ = ["SimulatedEvent", "SimulatedStream", "SimulatedStreams"]


@dataclass(eq=False)
class SimulatedEvent:
    done: bool = False
    #: The capture that it was recorded in, if any.
    capture: int | None = None


@dataclass(eq=False)
class SimulatedStream:
    queue: deque[tuple[SimulatedEvent | None, Callable[[], None] | None]] = field(default_factory=deque)
    capture: int | None = None


class SimulatedStreams:
    """As CUDA has them, for one thread.

    Args:
        seed: of the order in which streams run.

    Attributes:
        ignores_waits: streams that do not wait, which is wrong, for tests of the tests.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.ignores_waits: Callable[[SimulatedStream], bool] = lambda stream: False
        self.streams: list[SimulatedStream] = []
        self.default = self._current = self.new()
        #: Memory, and the streams that used it.
        self.held: list[tuple[torch.Tensor, SimulatedStream]] = []

    def current(self) -> SimulatedStream:
        return self._current

    def new(self) -> SimulatedStream:
        self.streams.append(SimulatedStream())
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream: SimulatedStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def record(self, stream: SimulatedStream) -> SimulatedEvent:
        event = SimulatedEvent(capture=stream.capture)
        stream.queue.append((None, lambda: setattr(event, "done", True)))
        return event

    def wait(self, stream: SimulatedStream, event: SimulatedEvent) -> None:
        if event.capture is None:
            assert stream.capture is None, "a capture depends on work outside of it"
        else:
            assert stream.capture in (None, event.capture), "a capture depends on another"
            stream.capture = event.capture
        if not self.ignores_waits(stream):
            stream.queue.append((event, None))

    def is_capturing(self, stream: SimulatedStream) -> bool:
        return stream.capture is not None

    def hold(self, memory: torch.Tensor, stream: SimulatedStream) -> None:
        self.held.append((memory, stream))

    def enqueue(self, work: Callable[[], None]) -> None:
        self._current.queue.append((None, work))

    @contextlib.contextmanager
    def capture(self, number: int) -> Iterator[None]:
        """Run what is enqueued inside at its end, as a graph's replay would."""
        self.run()
        stream = self.new()
        stream.capture = number
        with self.on(stream):
            yield
        joined = self.record(stream)
        while not joined.done:
            assert self._step(), "streams wait for each other"
        assert not any(other.queue for other in self.streams if other.capture == number), "a stream was not joined"
        for other in self.streams:
            if other.capture == number:
                other.capture = None

    def run(self) -> None:
        """Do all work that is left."""
        while self._step():
            pass
        assert not any(stream.queue for stream in self.streams), "streams wait for each other"

    def _step(self) -> bool:
        ready = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].done)]
        if not ready:
            return False
        _, work = self._random.choice(ready).queue.popleft()
        if work is not None:
            work()
        return True
