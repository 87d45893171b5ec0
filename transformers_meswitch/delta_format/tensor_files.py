"""Several safetensors files seen as one table of tensors, read lazily."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import DeltaFormatError, MESwitchError
from .header import TensorHeader, read_header

__all__ = ["TORCH_DTYPES", "TensorFiles"]

#: Safetensors names of the dtypes that deltas and checkpoints are read in.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFiles:
    """The tensors of one or more safetensors files (shards).

    All headers are read and checked at once; a tensor's data is mapped from the file when it is asked for.

    Args:
        paths: the files.
        error: type of the errors raised.

    Raises:
        MESwitchError: of type ``error``: a missing, truncated or inconsistent file, or a tensor held by two shards.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], error: type[MESwitchError] = DeltaFormatError) -> None:
        self.paths = [Path(path) for path in paths]
        self.headers: dict[str, TensorHeader] = {}
        self._error = error
        self._path_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in self.paths:
            if not path.is_file():
                raise error(f"{path} does not exist. Download or write the repo again.")
            for name, header in read_header(path, error).items():
                if name in self._path_of:
                    raise error(f"Tensor {name!r} is in both {self._path_of[name]} and {path}; expected one of them.")
                self.headers[name] = header
                self._path_of[name] = path

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.headers))

    def __len__(self) -> int:
        return len(self.headers)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, mapped from its file. Clone it before writing to it.

        Raises:
            MESwitchError: of type ``error``: no such tensor, or the file changed or cannot be read.
        """
        path = self._path(name)
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError) as cause:
            raise self._error(f"{path}: tensor {name!r} cannot be read ({cause}). Download it again.") from cause

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in memory of its own, which is given back with it.

        Pages of a mapped file count as this process's memory for as long as the file is open, however many tensors
        were let go since: a checkpoint that is gone through once would be held whole.

        Raises:
            MESwitchError: of type ``error``: no such tensor, or the file changed or cannot be read.
        """
        path, header = self._path(name), self.headers[name]
        if header.dtype not in TORCH_DTYPES:  # of a width that torch may not have; safetensors knows
            return self.tensor(name).clone()
        # On the CPU whatever the default device: transformers loads models with another.
        tensor = torch.empty(header.shape, dtype=TORCH_DTYPES[header.dtype], device="cpu")
        size = header.end - header.start
        if not size:
            return tensor
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(header.start)
                read = 0
                while read < size:
                    got = file.readinto(view[read:])
                    if not got:
                        raise OSError(f"it ends after {read} of {size} bytes")
                    read += got
        except OSError as cause:
            raise self._error(f"{path}: tensor {name!r} cannot be read ({cause}). Download it again.") from cause
        return tensor

    def announce(self, name: str) -> None:
        """Have the system fetch a tensor into its cache meanwhile; `KeyError` if there is none of that name."""
        if not hasattr(os, "posix_fadvise"):
            return
        header = self.headers[name]
        with self._path_of[name].open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), header.start, header.end - header.start, os.POSIX_FADV_WILLNEED)

    def _path(self, name: str) -> Path:
        if name not in self._path_of:
            close = difflib.get_close_matches(name, self.headers, n=1)
            hint = f"; the closest is {close[0]!r}" if close else ""
            raise self._error(f"There is no tensor {name!r} in {', '.join(map(str, self.paths))}{hint}.")
        return self._path_of[name]
