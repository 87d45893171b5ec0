"""Refusing numbers that are not finite."""

from __future__ import annotations

from torch import Tensor

from ..errors import CompressionError

__all__ = ["require_finite"]


def require_finite(tensor: Tensor, what: str, way_out: str) -> None:
    """Refuse NaN and infinity.

    Args:
        tensor: float, any shape.
        what: what the tensor is, for the message.
        way_out: what the user can do about it.

    Raises:
        CompressionError: naming the first such element and its place.
    """
    finite = tensor.isfinite()
    if not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        raise CompressionError(
            f"{what} is {tensor[tuple(where)].item()} at {where}, expected finite numbers. {way_out}"
        )
