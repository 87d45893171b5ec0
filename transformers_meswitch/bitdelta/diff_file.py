"""The tensors of a BitDelta diff, read without trusting the file: it is a pickle, which could otherwise run code."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import BitDeltaError

__all__ = ["read_diff"]

_WAY_OUT = "Give the diff.pt that BitDelta's save_diff wrote, and download it again if it should be one."
#: What torch says of a global that a pickle asks for and may not have.
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_diff(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file that ``torch.save`` wrote of a dictionary of tensors, by ``torch.load(weights_only=True)``.

    Nothing but tensors is made of what the file says, so nothing that it names is called. The tensors are mapped from
    it: their memory is the system's file cache, and no size that the file states has memory allocated for it.

    Args:
        path: the file.

    Returns:
        Name to tensor, dense, on the CPU, in the file's dtypes; each no larger than its bytes in the file.

    Raises:
        BitDeltaError: no such file; cut short, damaged, or of another kind; compressed; a pickle of anything else than
            tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise BitDeltaError(f"{path} is not a file. {_WAY_OUT}")
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a crafted file leads the reader to
        wanted = _GLOBAL.search(str(error))
        # torch's own message goes on to recommend reading the file without the restriction.
        reason = f"it asks for {wanted[1]}" if wanted else str(error).strip().partition("\n")[0]
        raise BitDeltaError(
            f"{path} cannot be read as tensors alone, and nothing else of a pickle is ever read: {reason}. {_WAY_OUT}"
        ) from error
    if not isinstance(content, dict):
        raise BitDeltaError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors. {_WAY_OUT}")
    for name, value in content.items():
        _check_tensor(path, name, value)
    return {name: value.detach() for name, value in content.items()}


def _check_archive(path: Path) -> None:
    """Refuse what is no whole archive, members whose size the file itself does not bound, and damaged ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next(filter(_is_compressed, archive.infolist()), None)
            # Mapped tensors are read past torch's own check of this.
            damaged = archive.testzip() if packed is None else None
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, struct.error) as error:
        raise BitDeltaError(
            f"{path} is no whole archive of the kind that torch.save writes ({error}): cut short, or another format, "
            f"such as safetensors or one of PyTorch before 1.6. {_WAY_OUT}"
        ) from error
    if packed is not None:
        raise BitDeltaError(
            f"{path} holds {packed.filename!r} compressed ({packed.compress_size:,} bytes that are said to unpack to "
            f"{packed.file_size:,}), which torch.save never writes and cannot be mapped. {_WAY_OUT}"
        )
    if damaged is not None:
        raise BitDeltaError(f"{path} is damaged: the checksum of {damaged!r} in it does not match. {_WAY_OUT}")


def _is_compressed(member: zipfile.ZipInfo) -> bool:
    return member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size


def _check_tensor(path: Path, name: object, value: object) -> None:
    if not isinstance(name, str):
        raise BitDeltaError(f"{path} has {name!r} among its names, expected texts. {_WAY_OUT}")
    if type(value) not in (Tensor, nn.Parameter):
        raise BitDeltaError(f"{name!r} in {path} is a {type(value).__name__}, expected a tensor. {_WAY_OUT}")
    assert isinstance(value, Tensor)
    plain = value.layout == torch.strided and not (value.is_quantized or value.is_nested or value.is_neg())
    if not plain or value.is_conj() or value.device.type != "cpu":
        raise BitDeltaError(
            f"{name!r} in {path} is a tensor of layout {value.layout} and dtype {value.dtype} on {value.device}, "
            f"expected a dense one with data. {_WAY_OUT}"
        )
    # One element may be repeated by a stride of zero, to any size.
    stated, held = value.numel() * value.itemsize, value.untyped_storage().nbytes()
    if stated > held:
        raise BitDeltaError(
            f"{name!r} in {path} has shape {tuple(value.shape)}, {stated:,} bytes, of which the file holds {held:,}. "
            f"{_WAY_OUT}"
        )
