"""Kernels that start before the one before them has ended. Importing this module needs Triton.

Of two kernels in a row, the second one's programs may start, and do what does not depend on the first, as soon as all
programs of the first allow it (NVIDIA's programmatic dependent launch, from Hopper on). That hides the microseconds
between them, which a matrix-vector product notices.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["allow_next", "overlap_options", "overlaps", "wait_for_previous"]


@triton.jit
def allow_next(OVERLAP: tl.constexpr) -> None:
    """Let the next kernel of the stream start; what this one stores it sees after :func:`wait_for_previous`."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr) -> None:
    """Wait until the kernel before has ended; what ran before that one had ended anyway."""
    if OVERLAP:
        gdc_wait()


@functools.cache
def overlaps(device: torch.device, ptx: bool) -> bool:
    """Whether a device starts kernels so."""
    return ptx and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap_options(overlap: bool) -> dict[str, bool]:
    """What Triton takes, beside a kernel's arguments, to start it so; backends without it know no such option."""
    return {"launch_pdl": True} if overlap else {}
