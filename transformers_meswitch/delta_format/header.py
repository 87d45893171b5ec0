"""The header of a safetensors file, read without trusting it.

A file is 8 bytes of little-endian header length, that many bytes of JSON, then the data. The ``safetensors`` package
reads tensors; this module answers what a file claims to hold, where each tensor's bytes lie, and whether the claims
fit the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import DeltaFormatError, MESwitchError

__all__ = ["TensorHeader", "parse_json", "read_header"]

#: Larger headers are refused by safetensors too.
_MAX_HEADER_BYTES = 100_000_000
#: Bytes of one element. Types packed below a byte (F4, F6) are absent: their sizes are left to safetensors.
_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor.

    Attributes:
        dtype: safetensors name of the dtype (``"BF16"``).
        shape: sizes.
        start: first byte of the data, counted from the start of the file.
        end: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_json(text: bytes, source: str, error: type[MESwitchError] = DeltaFormatError) -> dict[str, Any]:
    """Parse a JSON object from an untrusted file.

    Args:
        text: the bytes.
        source: the file's name, for the message.
        error: type to raise.

    Raises:
        MESwitchError: of type ``error``: not UTF-8, not JSON, nested beyond reason, or not an object.

    >>> parse_json(b'{"bits": 2}', "adapter_config.json")
    {'bits': 2}
    """
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{source} is not valid JSON ({cause}). Download or write it again.") from cause
    if not isinstance(value, dict):
        raise error(f"{source} holds a JSON {type(value).__name__}, expected an object.")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_header(
    path: str | os.PathLike[str], error: type[MESwitchError] = DeltaFormatError
) -> dict[str, TensorHeader]:
    """Read and check the header of a safetensors file; no tensor data is read.

    Args:
        path: the file.
        error: type to raise.

    Returns:
        Tensor name to header, in the order of the data.

    Raises:
        MESwitchError: of type ``error``, naming the file: truncated, not safetensors, or a header whose offsets do not
            cover the data exactly.
    """
    path = Path(path)

    def broken(found: str) -> MESwitchError:
        return error(f"{path} is not a complete safetensors file: {found}. Download or write it again.")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise broken(f"it has {size} bytes and announces a header of {length}")
        text = file.read(length)
    raw = parse_json(text, f"The header of {path}", error)
    raw.pop("__metadata__", None)
    data = 8 + length
    headers: dict[str, TensorHeader] = {}
    for name, entry in raw.items():
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if (
            not isinstance(dtype, str)
            or not isinstance(shape, list)
            or not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(map(_is_size, [*shape, *offsets]))
        ):
            raise broken(f"its header describes {name!r} as {entry!r}")
        start, end = offsets
        if dtype in _DTYPE_BYTES and end - start != prod(shape) * _DTYPE_BYTES[dtype]:
            raise broken(f"{name!r} of {dtype} {shape} is given {end - start} bytes")
        headers[name] = TensorHeader(dtype, tuple(shape), data + start, data + end)
    ordered = dict(sorted(headers.items(), key=lambda item: (item[1].start, item[1].end)))
    position = data
    for name, header in ordered.items():
        if header.start != position:
            raise broken(f"the data of {name!r} starts at byte {header.start}, expected {position}")
        position = header.end
    if position != size:
        raise broken(f"it has {size} bytes, its header needs {position}")
    return ordered
