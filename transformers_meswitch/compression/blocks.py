"""Working through a matrix in blocks of rows that fit a processor's cache, on all its cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

__all__ = ["over_blocks"]

#: Elements worked on at once: on a CPU the temporaries then stay in a core's cache; elsewhere they only have to stay
#: small beside the layer.
_BLOCK = {"cpu": 2**17}
_OTHER_BLOCK = 2**24

_Found = TypeVar("_Found")


def over_blocks(
    work: Callable[[int, int], _Found], shape: tuple[int, int] | torch.Size, device: torch.device
) -> list[_Found]:
    """What ``work(start, stop)`` returns for each block of rows, in order.

    On a CPU as many blocks are worked on at a time as torch has threads, each by one thread: torch's own threads wait
    for each other after each operation, which is long on small operations and longer still on busy cores. The blocks
    are the same however many threads there are, and so is the result.

    Args:
        work: called with the first row of a block and the one after its last; from several threads.
        shape: rows and columns of the matrix.
        device: where it is.

    >>> over_blocks(lambda start, stop: stop - start, (5, 2**17), torch.device("cpu"))
    [1, 1, 1, 1, 1]
    """
    rows, width = shape
    size = max(1, _BLOCK.get(device.type, _OTHER_BLOCK) // max(1, width))
    bounds = [(start, min(start + size, rows)) for start in range(0, rows, size)]
    threads = torch.get_num_threads()
    at_once = min(threads, len(bounds)) if device.type == "cpu" else 1
    if at_once <= 1:
        return [work(*bound) for bound in bounds]
    started = Barrier(at_once + 1)

    def start_one() -> None:
        torch.get_num_threads()  # what is asked of a thread that torch has not met would be forgotten
        torch.set_num_threads(1)
        started.wait()

    with ThreadPoolExecutor(at_once, initializer=start_one) as pool:
        found = [pool.submit(work, *bound) for bound in bounds]
        started.wait()
        torch.set_num_threads(threads)  # which is also what threads that torch has not met yet get
        return [future.result() for future in found]
