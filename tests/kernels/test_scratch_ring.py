"""The order of the scratch buffers' writes and reads, on simulated streams; the CPU's path."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meswitch_kernels import ScratchRing
from tests.kernels.simulated_streams import SimulatedStreams


@dataclass(frozen=True)
class Fill:
    """A content of one value, written in two pieces by the work of a stream."""

    streams: SimulatedStreams
    value: int
    nbytes: int = 4

    def write(self, memory: torch.Tensor, ahead: bool) -> None:
        assert memory.nbytes >= self.nbytes
        half = self.nbytes // 2
        self.streams.enqueue(lambda: memory[:half].fill_(self.value))  # type: ignore[arg-type, return-value]
        self.streams.enqueue(lambda: memory[half : self.nbytes].fill_(self.value))  # type: ignore[arg-type, return-value]


def read(ring: ScratchRing, content: Fill, then: Fill | None, seen: list[bool]) -> None:
    """Note, when the stream comes to it, whether the content is there, in two looks."""

    def work(memory: torch.Tensor) -> None:
        for _ in range(2):
            content.streams.enqueue(
                lambda: seen.append(bool((memory[: content.nbytes] == content.value).all()))  # type: ignore[func-returns-value]
            )

    ring.use(content, work, then)


#: Of each call: its content, its user's stream, and whether it announces the next call, another content or nothing.
CALLS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 2), st.sampled_from(["next", "wrong", "nothing"])),
    min_size=1,
    max_size=12,
)


def follow(ring: ScratchRing, streams: SimulatedStreams, calls: list[tuple[int, int, str]]) -> list[bool]:
    seen: list[bool] = []
    users = [streams.default, streams.new(), streams.new()]
    contents = [Fill(streams, value, 4 * value) for value in range(6)]
    for (value, user, announces), after in zip(calls, [*calls[1:], (0, 0, "")], strict=True):
        then = {"next": contents[after[0]], "wrong": contents[5], "nothing": None}[announces]
        with streams.on(users[user]):
            read(ring, contents[value], then, seen)
    streams.run()
    return seen


@given(CALLS, st.integers(0, 1000))
def test_each_work_sees_its_content_in_any_order_that_streams_run_in(
    calls: list[tuple[int, int, str]], seed: int
) -> None:
    streams = SimulatedStreams(seed)
    seen = follow(ScratchRing("cpu", streams), streams, calls)
    assert len(seen) == 2 * len(calls)
    assert all(seen)


@pytest.mark.parametrize("ignores_waits", ["of users", "of the ring"])
def test_the_simulation_sees_a_missing_wait(ignores_waits: str) -> None:
    calls = [(value, value % 2, "next") for value in (4, 3, 2, 1)]
    found = []
    for seed in range(20):
        streams = SimulatedStreams(seed)
        ring = ScratchRing("cpu", streams)
        side = streams.streams[-1]
        streams.ignores_waits = lambda stream, side=side: (stream is side) == (ignores_waits == "of the ring")
        found.append(all(follow(ring, streams, calls)))
    assert not all(found)


def test_a_write_runs_beside_the_work_before_it() -> None:
    """In some order the next content is complete before the work on this one has begun."""
    orders = set()
    for seed in range(30):
        streams = SimulatedStreams(seed)
        ring, order = ScratchRing("cpu", streams), []

        @dataclass(frozen=True)
        class Noted(Fill):
            order: list[str] | None = None

            def write(self, memory: torch.Tensor, ahead: bool) -> None:
                self.streams.enqueue(lambda: self.order.append(f"write {self.value}"))  # type: ignore[union-attr]

        one, two = Noted(streams, 1, order=order), Noted(streams, 2, order=order)
        ring.use(one, lambda memory, s=streams, o=order: s.enqueue(lambda: o.append("work 1")), two)
        streams.run()
        orders.add(tuple(order))
    assert orders == {("write 1", "work 1", "write 2"), ("write 1", "write 2", "work 1")}


def test_contents_are_written_once_and_buffers_are_two() -> None:
    streams = SimulatedStreams()
    ring = ScratchRing("cpu", streams)
    written: list[tuple[int, bool]] = []

    @dataclass(frozen=True)
    class Counted(Fill):
        def write(self, memory: torch.Tensor, ahead: bool) -> None:
            written.append((self.value, ahead))

    contents = [Counted(streams, value, 10 + value) for value in range(5)]
    for content, then in zip(contents, [*contents[1:], None], strict=True):
        ring.use(content, lambda memory: None, then)
    assert written == [(0, False), (1, True), (2, True), (3, True), (4, True)]
    assert ring.nbytes == 13 + 14
    ring.use(contents[0], lambda memory: None)
    ring.use(contents[0], lambda memory: None)
    assert written[5:] == [(0, False), (0, False)]
    assert ring.nbytes <= 2 * 14


def test_without_announcements_there_is_one_buffer() -> None:
    streams = SimulatedStreams()
    ring, seen = ScratchRing("cpu", streams), list[bool]()
    for value in (2, 1, 4, 3):
        read(ring, Fill(streams, value, 4 * value), None, seen)
    streams.run()
    assert all(seen)
    assert ring.nbytes == 16


def test_a_capture_has_buffers_and_events_of_its_own() -> None:
    streams = SimulatedStreams(1)
    ring = ScratchRing("cpu", streams)
    seen: list[bool] = []
    contents = [Fill(streams, value) for value in range(4)]
    for number in (None, 1, 2, None, 3):
        if number is None:
            for content, then in zip(contents, [*contents[1:], None], strict=True):
                read(ring, content, then, seen)
            continue
        with streams.capture(number):
            for content, then in zip(contents, [*contents[1:], None], strict=True):
                read(ring, content, then, seen)
    streams.run()
    assert len(seen) == 40
    assert all(seen)
    places = {memory.data_ptr() for memory, _ in streams.held}
    assert len(places) >= 6, "graphs share buffers with each other or with other work"


def test_a_capture_that_announces_too_much_is_not_joined_unless_it_says_so() -> None:
    streams = SimulatedStreams(1)
    ring = ScratchRing("cpu", streams)
    one, two = Fill(streams, 1), Fill(streams, 2)
    with streams.capture(1):
        read(ring, one, two, [])
        ring.discard()
    with pytest.raises(AssertionError, match="not joined"):  # noqa: PT012
        for seed in range(20):
            streams = SimulatedStreams(seed)
            ring = ScratchRing("cpu", streams)
            with streams.capture(1):
                read(ring, Fill(streams, 1), Fill(streams, 2), [])


def test_what_was_announced_before_a_step_broke_off_is_forgotten_when_asked() -> None:
    streams = SimulatedStreams()
    ring, seen = ScratchRing("cpu", streams), list[bool]()

    class Changed(Fill):
        value = 1

    content = Changed(streams, 1)

    def fail(memory: torch.Tensor) -> None:
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        ring.use(Fill(streams, 7), fail, content)
    streams.run()
    object.__setattr__(content, "value", 2)
    ring.discard()
    read(ring, content, None, seen)
    streams.run()
    assert all(seen)


def test_a_copy_has_buffers_of_its_own() -> None:
    ring = ScratchRing("cpu")
    ring.use(Bytes(8), lambda memory: None)
    for other in (copy.deepcopy(ring), pickle.loads(pickle.dumps(ring))):
        assert (other.device, other.nbytes) == (ring.device, 0)


def test_buffers_go_with_the_ring() -> None:
    ring, places = ScratchRing("cpu"), []
    for size in (8, 8, 4):
        ring.use(Bytes(size), lambda memory: places.append(weakref.ref(memory.untyped_storage())), Bytes(8))
    assert ring.nbytes == 16
    del ring
    gc.collect()
    assert all(place() is None for place in places)


def test_inference_mode_leaves_buffers_that_can_be_written_outside_of_it() -> None:
    ring = ScratchRing("cpu")
    with torch.inference_mode():
        ring.use(Bytes(8), lambda memory: None)
    ring.use(Bytes(8), lambda memory: None)
    ring.use(Bytes(8), lambda memory: None)


def test_threads_take_turns() -> None:
    ring, wrong = ScratchRing("cpu"), []

    def run(value: int) -> None:
        for _ in range(200):
            content = Bytes(64, value)
            ring.use(content, lambda memory: wrong.append(value) if (memory[:64] != value).any() else None, content)

    threads = [threading.Thread(target=run, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@dataclass(frozen=True)
class Bytes:
    nbytes: int
    value: int = 0

    def write(self, memory: torch.Tensor, ahead: bool) -> None:
        memory[: self.nbytes].fill_(self.value)
