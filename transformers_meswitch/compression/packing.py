"""Codes of 1 to 4 bits as bytes, and back. The bit order is part of the delta format (``docs/delta_format.md``).

Code ``i`` of a row occupies bits ``[i * bits, (i + 1) * bits)`` of the row's little-endian bit stream: bit ``k`` of
the stream is bit ``k % 8`` of byte ``k // 8``. Every row starts on a byte; the bits that pad its last byte are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..delta_format.spec import SUPPORTED_BITS, packed_width
from ..errors import CompressionError, DeltaFormatError

__all__ = ["pack", "unpack"]

#: Eight codes of any width fill whole bytes (as many as a code has bits), so they are moved as one integer.
_GROUP = 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes row by row.

    Args:
        codes: uint8 ``[out, n]``, each below ``2 ** bits``; any device.
        bits: bits of one code, 1 to 4.

    Returns:
        uint8 ``[out, ceil(n * bits / 8)]`` on the same device.

    Raises:
        CompressionError: another dtype or rank, unsupported bits, or a code of ``2 ** bits`` or more.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=2).tolist()  # 0b11_10_01
    [[57]]
    """
    if bits not in SUPPORTED_BITS:
        raise CompressionError(f"bits is {bits!r}; supported are {SUPPORTED_BITS}.")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise CompressionError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}, expected uint8 [out, n].")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise CompressionError(f"a code is {int(codes.max())}, expected below {2**bits} for {bits} bits.")
    out, channels = codes.shape
    if not codes.numel():
        return codes.new_empty(out, packed_width(channels, bits))
    groups = -(-channels // _GROUP)
    padding = groups * _GROUP - channels
    grouped = (nn.functional.pad(codes, (0, padding)) if padding else codes.contiguous()).view(out, groups, _GROUP)
    # Eight codes, a byte each, are one integer; neighbours are moved together, then pairs of them, then fours.
    word = grouped.view(torch.int64)
    for width in (1, 2):
        kept = sum((1 << (2 * width * bits)) - 1 << start for start in range(0, 64, 16 * width))
        word = (word | (word >> (width * (8 - bits)))) & kept
    word |= word >> (4 * (8 - bits))
    packed = word.view(torch.uint8)[..., :bits].contiguous()
    return packed.view(out, groups * bits)[:, : packed_width(channels, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8 ``[out, ceil(n * bits / 8)]``; any device.
        bits: bits of one code, 1 to 4.
        n: codes in a row.

    Returns:
        uint8 ``[out, n]`` on the same device.

    Raises:
        DeltaFormatError: unsupported bits, another dtype, or a width that does not hold ``n`` codes.

    >>> unpack(torch.tensor([[57]], dtype=torch.uint8), bits=2, n=3).tolist()
    [[1, 2, 3]]
    """
    if bits not in SUPPORTED_BITS:
        raise DeltaFormatError(f"bits is {bits!r}; supported are {SUPPORTED_BITS}.")
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != packed_width(n, bits):
        raise DeltaFormatError(
            f"packed codes are {packed.dtype} of shape {tuple(packed.shape)}, "
            f"expected uint8 [out, {packed_width(n, bits)}] for {n} codes of {bits} bits."
        )
    out = packed.shape[0]
    groups = -(-n // _GROUP)
    grouped = nn.functional.pad(packed, (0, groups * bits - packed.shape[1])).view(out, groups, bits)
    word = torch.zeros(out, groups, dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        word |= grouped[:, :, byte].to(torch.int64) << (8 * byte)
    codes = torch.stack([(word >> (i * bits)) & (2**bits - 1) for i in range(_GROUP)], dim=-1).to(torch.uint8)
    return codes.view(out, groups * _GROUP)[:, :n].contiguous()
