"""Writing a safetensors file tensor by tensor: the bytes of ``safetensors``, with one tensor in memory.

A file is 8 bytes of little-endian header length, that many bytes of JSON padded with spaces to a multiple of 8, then
the data: tensors of wide dtypes first, so that each is aligned, and by name within a dtype.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from math import prod
from typing import IO

import torch

__all__ = ["file_bytes", "tensor_bytes", "write_tensors"]

#: Bytes of one element, in the order of the data.
_DTYPE_BYTES = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1}
#: Written in pieces, so that a tensor on an accelerator or of foreign strides is not copied as a whole.
_CHUNK = 1 << 26


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data.

    Args:
        dtype: safetensors name, one of I64, F64, F32, I32, BF16, F16 and U8.
        shape: sizes.

    >>> tensor_bytes("BF16", (3, 5))
    30
    """
    return _DTYPE_BYTES[dtype] * prod(shape)


def write_tensors(
    path: str | os.PathLike[str],
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    get: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file. The same input gives the same bytes.

    Args:
        path: the file.
        headers: tensor name to safetensors dtype and shape.
        get: name to tensor of that dtype and shape, on any device; asked for one at a time, in the order of the data.
        metadata: the file's ``__metadata__``, text to text.

    Raises:
        OSError: the disk is full or not writable; what there is of the file is left.
    """
    text, names, _ = _header(headers, metadata)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _write(file, get(name))


def file_bytes(headers: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that :func:`write_tensors` writes.

    >>> file_bytes({"a": ("BF16", (3, 5))})
    102
    """
    text, _, data = _header(headers, metadata)
    return 8 + len(text) + data


def _header(
    headers: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str], int]:
    """A file's header, the names of its tensors in the order of the data, and the bytes of the data."""
    order = list(_DTYPE_BYTES)
    names = sorted(headers, key=lambda name: (order.index(headers[name][0]), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        dtype, shape = headers[name]
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), names, offset


def _write(file: IO[bytes], tensor: torch.Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    step = _CHUNK // tensor.element_size()
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].cpu().contiguous()
        file.write(piece.view(torch.uint8).numpy().data)
