"""What deltas are multiplied by: activations as they are, or rounded to integers and laid out as the codes are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .configurations import Configuration
from .op import has_ptx, multiplies_bytes
from .row_groups import RowGroups

if TYPE_CHECKING:
    from .triton_activations import PreparedActivations

_prepare_with_triton: Callable[..., Any] | None = None
if importlib.util.find_spec("triton") is not None:
    from .triton_activations import prepare_activations_triton
    from .triton_grids import overlaps

    _prepare_with_triton = prepare_activations_triton

__all__ = ["Numerics", "numerics_of", "prepared"]

#: What a delta's codes are multiplied by. ``"exact"``: activations in their own dtype. ``"int8"`` and ``"int16"``:
#: activations times column steps, quantised to so many bits with a scale every one or two thousand codes, in integer
#: products; how many share a scale is tuned, for batches of one row and of more. But with ``"int16"`` bfloat16 rows
#: that share an expert are multiplied in bfloat16, which takes as many bytes. Sums are float32 throughout; base
#: and salient channels are never quantised. On a device without kernels all are float32, and on one whose tensor cores
#: do not multiply bytes (:func:`~meswitch_kernels.op.multiplies_bytes`) all are exact.
Numerics = Literal["exact", "int8", "int16"]

_PLANES = {"exact": 0, "int8": 1, "int16": 2}


def numerics_of(dtype: torch.dtype, asked: Numerics | None = None) -> Numerics:
    """How activations of a dtype are multiplied by: as asked, or by default about as exactly as the dtype rounds.

    Args:
        dtype: of the activations.
        asked: `None` for the default: ``"int16"`` for 16-bit dtypes, and ``"exact"`` for float32. A 16-bit integer
            loses less than bfloat16 does, and less than float16 unless the largest activation of a scale is more
            than some sixteen times the usual one; what is so large is mostly a salient channel, which has no scale.

    Raises:
        ValueError: unknown numerics.

    >>> numerics_of(torch.bfloat16), numerics_of(torch.float32), numerics_of(torch.float32, "int8")
    ('int16', 'exact', 'int8')
    """
    if asked is None:
        return "exact" if dtype == torch.float32 else "int16"
    if asked not in get_args(Numerics):
        raise ValueError(f"numerics is {asked!r}, expected one of {', '.join(get_args(Numerics))}.")
    return asked


@contextmanager
def prepared(
    x: torch.Tensor, tables: Sequence[torch.Tensor], groups: RowGroups, numerics: str, sizes: Configuration
) -> Iterator[tuple[PreparedActivations, int, bool, bool]]:
    """Prepare activations, and yield what kernels that multiply by them take after the groups.

    Args:
        x: contiguous ``[rows, in]``, float32, bfloat16 or float16.
        tables: int64 ``[slots, len(COLUMNS)]`` each, of the linears that ``x`` is the input of.
        groups: the rows by expert.
        numerics: how to.
        sizes: of blocks; ``block_codes`` counts.

    Yields:
        The prepared activations, ``planes``, ``ptx`` and ``overlap``.
    """
    assert _prepare_with_triton is not None
    planes, ptx = _PLANES[numerics] if multiplies_bytes(x.device) else 0, has_ptx(x.device)
    # Without channels nothing is prepared, and there is no kernel to overlap.
    overlap = overlaps(x.device, ptx) and x.shape[1] > 0
    # Triton launches on the current device, which need not be the tensors'.
    with torch.accelerator.device_index(x.device.index):
        yield _prepare_with_triton(x, tables, groups, planes, sizes.block_codes, overlap), planes, ptx, overlap
