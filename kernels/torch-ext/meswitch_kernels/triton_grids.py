"""Launches: how many programs, and kernels that start before the one before has ended. Needs Triton.

Of two kernels in a row, the second one's programs may start, and do what does not depend on the first, as soon as all
programs of the first allow it (NVIDIA's programmatic dependent launch, from Hopper on). That hides the microseconds
between them, which a matrix-vector product notices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .configurations import Configuration, program_count
from .op import capability

__all__ = [
    "aligned",
    "allow_next",
    "group_launches",
    "kernel_options",
    "overlap_options",
    "overlaps",
    "wait_for_previous",
]

#: Rows of a group that a program takes at a time, as many as an operand of tensor cores has.
_TENSOR_CORE_ROWS = 16


@triton.jit
def allow_next(OVERLAP: tl.constexpr) -> None:
    """Let the next kernel of the stream start; what this one stores it sees after :func:`wait_for_previous`.

    Who waits for a kernel has waited for what came before it only if that kernel waited itself, in one of its programs
    at least, if only at its end. The kernels here do, and what runs before them has to, whoever made it. The first of
    a call lets the next one start after its own wait: so the next may read, before it waits, what was there before
    the call: inputs, groups and tables, but not what the first one writes.
    """
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr) -> None:
    """Wait until the kernel before has ended, and see what it wrote."""
    if OVERLAP:
        gdc_wait()


def group_launches(
    rows: int, channels: Sequence[int], single: Configuration, several: Configuration, device: torch.device
) -> Iterator[tuple[int, int, Configuration]]:
    """The kernels of groups of several rows and of one: rows of a program, programs, and sizes of blocks.

    ``channels`` are those of each linear. The second kernel begins later than the first even if that finds nothing to
    do. Groups of several rows come first: their time is shorter, so a late start would cost a larger share of it.

    >>> sizes = Configuration(block_out=16)
    >>> [launch[:2] for launch in group_launches(4, [24], sizes, sizes, torch.device("cpu"))]
    [(16, 4), (1, 8)]
    """
    if rows > 1:
        pieces = rows // 2 * sum(triton.cdiv(own, several.block_out) for own in channels)
        yield _TENSOR_CORE_ROWS, program_count(pieces, several, device), several
    blocks = sum(triton.cdiv(own, single.block_out) for own in channels)
    yield 1, program_count(rows * blocks, single, device), single


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at a multiple of 16 bytes.

    Triton compiles for each alignment, and CUDA loads no kernel while a graph is captured: what was launched before,
    to be there then, was for this one.
    """
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def overlaps(device: torch.device, ptx: bool) -> bool:
    """Whether a device starts kernels so."""
    return ptx and capability(device) >= (9, 0)


def kernel_options(
    sizes: Configuration, block_codes: int, planes: int, ptx: bool, overlap: bool
) -> dict[str, int | bool]:
    """What all kernels that multiply by codes are compiled for and launched with, beside what is their own.

    Args:
        sizes: of blocks; those of codes are ``block_codes``, for which the activations were prepared.
        block_codes: codes of a tile.
        planes: 0, 1 or 2.
        ptx: whether the device has NVIDIA's instructions.
        overlap: whether to start while the activations are being prepared.
    """
    return {
        "PLANES": planes,
        "BLOCK_OUT": sizes.block_out,
        "BLOCK_CODES": block_codes,
        "WARPS": sizes.warps,
        "PTX": ptx,
        "OVERLAP": overlap,
        "STAGES": sizes.stages,
        **sizes.launch_options(),
        **overlap_options(overlap),
    }


def overlap_options(overlap: bool) -> dict[str, bool]:
    """What a kernel that waits for the previous one is launched with; backends without such a start know no option."""
    return {"launch_pdl": True} if overlap else {}
