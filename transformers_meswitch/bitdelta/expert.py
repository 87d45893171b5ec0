"""The expert that a BitDelta diff makes of its base: deltas of its linears, and all its other parameters."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..compression.sources import CheckpointParameters
from ..delta_format.spec import LinearRecord
from .diff import Diff, Signs

__all__ = ["DiffParameters", "linear_modules", "linear_of"]


def linear_of(signs: Signs) -> tuple[LinearRecord, dict[str, Tensor]]:
    """A linear's delta in the delta format: the same bits and exactly the same ``±coeff``.

    BitDelta's words and the format's bytes have their bits in the same order, lowest first, so that only the matrix
    is transposed. The levels of one bit are half a step from zero. A coefficient that training made negative gives the
    opposite codes, since steps are not negative.

    Args:
        signs: mask int32 ``[in / 32, out]``, and a coefficient that is not zero.

    Returns:
        The record, and ``codes`` uint8 ``[out, in / 8]`` and ``step`` float32 ``[out]`` on the CPU.

    >>> record, leaves = linear_of(Signs(torch.tensor([[1, -1]], dtype=torch.int32), coeff=-0.25))
    >>> record.out_features, record.in_features, leaves["codes"].tolist(), leaves["step"].tolist()
    (2, 32, [[254, 255, 255, 255], [0, 0, 0, 0]], [0.5, 0.5])
    """
    words, out_features = signs.mask.shape
    # Of one word a row, contiguous() would keep strides that no bytes can be seen through.
    codes = signs.mask.T.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    record = LinearRecord(out_features, 32 * words, bits=1)
    return record, {
        "codes": codes if signs.coeff > 0 else ~codes,
        "step": torch.full((out_features,), 2 * abs(signs.coeff), dtype=torch.float32),
    }


def linear_modules(
    diff: Diff, finished: Container[str], *, progress: bool = True
) -> Iterator[tuple[str, LinearRecord, dict[str, Tensor]]]:
    """The linears that a diff changes, one after the other.

    Args:
        diff: the diff.
        finished: names of modules to leave out.
        progress: whether to show a progress bar.

    Yields:
        Canonical module name, record, and leaves as of :func:`linear_of`.
    """
    for name, signs in tqdm(diff.signs.items(), desc="Importing", unit="linear", disable=not progress):
        if signs.coeff and name not in finished:
            yield name, *linear_of(signs)


class DiffParameters:
    """The base's parameters with those in place that a diff holds whole, cast to the base's dtype.

    See :class:`~..compression.sources.Parameters`. Of linears that have a mask, they are the base's.

    Args:
        base: the base's parameters.
        diff: the diff.
        embedding: canonical name of the input embedding.
        head: that of the output head, if there is one.
    """

    def __init__(self, base: CheckpointParameters, diff: Diff, embedding: str, head: str | None) -> None:
        self._base, self._given = base, dict(diff.parameters)
        self.tied, self.modules = diff.tied, base.modules
        if diff.tied and f"{embedding}.weight" in self._given:
            self._given[f"{head}.weight"] = self._given[f"{embedding}.weight"]

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters by name."""
        return {
            key: tuple(self._given[full].shape) if (full := f"{module}.{key}") in self._given else shape
            for key, shape in self._base.shapes(module).items()
        }

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own parameters by name, floating, on the CPU in the base's dtype."""
        return {
            key: self._given[full].to(value.dtype) if (full := f"{module}.{key}") in self._given else value
            for key, value in self._base.of(module).items()
        }

    def announce(self, module: str) -> None:
        """Have the system fetch the base's parameters from the disk meanwhile."""
        self._base.announce(module)
