"""How tensors are shared out among files of a size."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import DeltaFormatError, MESwitchError
from ..sizes import parse_size
from .serialize import tensor_bytes

__all__ = ["shard_limit", "split_tensors"]


def shard_limit(size: int | str, error: type[MESwitchError] = DeltaFormatError) -> int:
    """The bytes of a ``max_shard_size``.

    Args:
        size: bytes, or a size such as ``"5GB"``.
        error: type of the error raised.

    Raises:
        MESwitchError: of that type: a text that is no size, or no bytes at all.

    >>> shard_limit("5GB"), shard_limit(4096)
    (5000000000, 4096)
    """
    try:
        found = size if isinstance(size, int) else parse_size(size)
    except ValueError:
        found = 0
    if found < 1:
        raise error(f"max_shard_size is {size!r}, expected bytes or a size such as '5GB' or '500MB'.")
    return found


def split_tensors(headers: Mapping[str, tuple[str, tuple[int, ...]]], limit: int | None = None) -> list[list[str]]:
    """Names of the tensors of each file, in the order of names; a tensor is never split.

    Args:
        headers: tensor name to safetensors dtype and shape.
        limit: bytes of tensors that a file holds at most, unless one tensor alone has more.

    >>> split_tensors({"a": ("BF16", (8,)), "b": ("BF16", (8,)), "c": ("F32", (100,))}, 32)
    [['a', 'b'], ['c']]
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name in sorted(headers):
        size = tensor_bytes(*headers[name])
        if limit is not None and groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
