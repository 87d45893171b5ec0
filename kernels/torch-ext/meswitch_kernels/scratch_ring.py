"""Two buffers in turn: into one is written what the next matmul needs, while the last one's matmul reads the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from .streams import Streams, streams_of

__all__ = ["ScratchContent", "ScratchRing"]

_Result = TypeVar("_Result")


class ScratchContent(Protocol):
    """What a buffer is filled with. Contents that are equal are the same bytes as long as nothing changes them."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    def write(self, memory: torch.Tensor, ahead: bool) -> None:
        """Enqueue the writing of it on the current stream.

        Args:
            memory: uint8, ``nbytes`` or more, on the device; it starts at a multiple of 256 bytes.
            ahead: whether other work runs beside, so that the writer should not take all of the device.
        """


@dataclass
class _Buffer:
    """Memory, if it was needed yet, and the events after which it may be read and written."""

    memory: torch.Tensor | None = None
    written: Any = None
    used: Any = None


@dataclass
class _Lane:
    """The stream that writes, its two buffers, which of them was written last, and what it has for the next call."""

    side: Any
    buffers: tuple[_Buffer, _Buffer] = field(default_factory=lambda: (_Buffer(), _Buffer()))
    last: int = 0
    ahead: tuple[ScratchContent, _Buffer] | None = None


class ScratchRing:
    """Scratch memory of a model on one device, for all its layers: a buffer as large as the largest content, or two.

    Each content is written on a stream of the ring's own, and the one after it while the work on this one runs, if the
    caller says what that is; only for that is there a second buffer. Nothing waits on the host. Calls come from any
    thread and any stream, and what they do to the buffers is ordered by events: calls that alternate between streams
    are right, and slower than one by one.

    A CUDA graph that is captured gets buffers of its own, in the memory of the graph, so that its replays touch no
    buffer that other work uses; its calls fork the ring's stream off the capturing one and join it again. What is
    announced in a capture has to be used in it, or dropped with :meth:`discard`: CUDA refuses a graph with a stream
    that has not been joined. One thread captures one graph at a time.

    On the CPU each content is written when it is announced, and there is nothing to wait for.

    Args:
        device: device of the contents.
        streams: its streams; for tests.

    >>> class Fill:
    ...     nbytes = 2
    ...     def __init__(self, value):
    ...         self.value = value
    ...     def write(self, memory, ahead):
    ...         print("writing", self.value, "ahead" if ahead else "now")
    ...         memory.fill_(self.value)
    >>> ring = ScratchRing("cpu")
    >>> one, two = Fill(1), Fill(2)
    >>> ring.use(one, lambda memory: memory[:2].tolist(), then=two)
    writing 1 now
    writing 2 ahead
    [1, 1]
    >>> ring.use(two, lambda memory: memory[:2].tolist())
    [2, 2]
    """

    def __init__(self, device: torch.device | str, streams: Streams | None = None) -> None:
        self.device = torch.empty(0, device=device).device
        self._streams = streams_of(self.device) if streams is None else streams
        self._lock = threading.Lock()
        self._largest = 0
        self._eager = _Lane(self._streams.new())
        # By thread: captures of two threads may not share events, which would merge their graphs.
        self._captured: dict[int, _Lane] = {}

    def __reduce__(self) -> tuple[type[ScratchRing], tuple[torch.device]]:
        # A copy of a model has buffers of its own, and a saved one none.
        return ScratchRing, (self.device,)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers outside of graphs."""
        return sum(buffer.memory.nbytes for buffer in self._eager.buffers if buffer.memory is not None)

    def use(
        self, content: ScratchContent, work: Callable[[torch.Tensor], _Result], then: ScratchContent | None = None
    ) -> _Result:
        """Enqueue work on a content, on the current stream.

        Args:
            content: what the work needs. It is not written again if the call before announced it, so nothing that it
                is made of may have changed since; after a step that was broken off, :meth:`discard` makes sure.
            work: enqueues the work, given the memory that holds the content; uint8, ``content.nbytes`` or more. It
                may not keep the memory, nor call the ring.
            then: content of the next call, which is written while the work runs.

        Returns:
            What ``work`` returns.
        """
        streams = self._streams
        with self._lock:
            lane, current = self._lane(), streams.current()
            announced, lane.ahead = lane.ahead, None
            if announced is not None and announced[0] == content:
                buffer = announced[1]
            else:
                buffer = self._write(lane, content, current, ahead=False)
            assert buffer.memory is not None
            streams.wait(current, buffer.written)
            if then is not None:
                lane.ahead = then, self._write(lane, then, current, ahead=True)
            streams.hold(buffer.memory, current)
            try:
                return work(buffer.memory)
            finally:
                buffer.used = streams.record(current)

    def discard(self) -> None:
        """Forget what was announced, such as after a step that was broken off. The current stream waits for it."""
        with self._lock:
            lane = self._lane()
            if lane.ahead is not None:
                self._streams.wait(self._streams.current(), lane.ahead[1].written)
            lane.ahead = None

    def _lane(self) -> _Lane:
        thread = threading.get_ident()
        if not self._streams.is_capturing(self._streams.current()):
            # The graph keeps the memory of a capture that has ended, not the ring.
            self._captured.pop(thread, None)
            return self._eager
        lane = self._captured.get(thread)
        if lane is None:
            lane = self._captured[thread] = _Lane(self._streams.new())
        elif not self._streams.is_capturing(lane.side):
            # Of a capture that has ended: its events mean nothing in this one, and its buffers are another graph's.
            lane = self._captured[thread] = _Lane(lane.side)
        return lane

    def _write(self, lane: _Lane, content: ScratchContent, current: Any, ahead: bool) -> _Buffer:
        """Write a content into one of the buffers; the side stream waits for all that it has to."""
        streams = self._streams
        if ahead:
            # The one written last is the one that this call reads.
            lane.last = 1 - lane.last
        # Otherwise into the same memory again, of which more is still in the device's cache.
        buffer = lane.buffers[lane.last]
        self._largest = max(self._largest, content.nbytes)
        if buffer.memory is None or buffer.memory.nbytes < content.nbytes:
            buffer.memory = None
            buffer.memory = self._allocate(lane)
        # What the content is made of, and the memory, may be new on the current stream.
        streams.wait(lane.side, streams.record(current))
        if buffer.used is not None:
            streams.wait(lane.side, buffer.used)
        with streams.on(lane.side):
            content.write(buffer.memory, ahead)
        buffer.written = streams.record(lane.side)
        return buffer

    def _allocate(self, lane: _Lane) -> torch.Tensor:
        # Outside of inference mode, memory that was allocated in it could not be written.
        with torch.inference_mode(False):
            memory = torch.empty(self._largest, dtype=torch.uint8, device=self.device)
        self._streams.hold(memory, lane.side)
        return memory
