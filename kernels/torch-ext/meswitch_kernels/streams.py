"""Queues of work of a device, as little of them as :class:`~meswitch_kernels.ScratchRing` needs."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch

__all__ = ["DeviceStreams", "NoStreams", "Streams", "streams_of"]


class Streams(Protocol):
    """Streams and events of one device. Streams run side by side, the work on one in its order."""

    def current(self) -> Any:
        """The stream on which the calling thread's work goes."""

    def new(self) -> Any:
        """Another stream."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Inside, the calling thread's work goes on ``stream``."""

    def record(self, stream: Any) -> Any:
        """An event: all the work that is on ``stream`` by now."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let what comes on ``stream`` from now on wait for an event. The host does not."""

    def is_capturing(self, stream: Any) -> bool:
        """Whether work on ``stream`` goes into a graph instead of being run."""

    def hold(self, memory: torch.Tensor, stream: Any) -> None:
        """Once ``memory`` is freed, let nothing have it before what is on ``stream`` by then is done."""


class NoStreams:
    """A device that has done a call's work when the call returns: the CPU."""

    def current(self) -> None:
        """There is none."""

    def new(self) -> None:
        """There is none."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Changes nothing."""
        return contextlib.nullcontext()

    def record(self, stream: Any) -> None:
        """Nothing is left to wait for."""

    def wait(self, stream: Any, event: Any) -> None:
        """Nothing is left to wait for."""

    def is_capturing(self, stream: Any) -> bool:
        """Never."""
        return False

    def hold(self, memory: torch.Tensor, stream: Any) -> None:
        """Nothing uses it any more."""


class DeviceStreams:
    """Streams of an accelerator.

    Args:
        device: with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)

    def current(self) -> torch.Stream:
        """The calling thread's."""
        return self._module.current_stream(self._device)

    def new(self) -> torch.Stream:
        """One of torch's pool."""
        return self._module.Stream(self._device)

    def on(self, stream: torch.Stream) -> contextlib.AbstractContextManager[Any]:
        """The device becomes the current one too."""
        return self._module.stream(stream)

    def record(self, stream: torch.Stream) -> torch.Event:
        """A new event, without a time."""
        return stream.record_event()

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """Under capture, a stream that waits for the graph's work is captured from then on."""
        stream.wait_event(event)

    def is_capturing(self, stream: torch.Stream) -> bool:
        """False where the device has no graphs."""
        asks = getattr(self._module, "is_current_stream_capturing", None)
        if asks is None:
            return False
        with self.on(stream):
            return bool(asks())

    def hold(self, memory: torch.Tensor, stream: torch.Stream) -> None:
        """The caching allocator keeps the block back."""
        memory.record_stream(stream)


def streams_of(device: torch.device) -> Streams:
    """Streams of a device, or what stands for them on the CPU."""
    return NoStreams() if device.type == "cpu" else DeviceStreams(device)
