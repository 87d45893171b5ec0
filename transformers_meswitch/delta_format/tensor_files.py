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

__all__ = ["TensorFiles"]


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
        if name not in self._path_of:
            close = difflib.get_close_matches(name, self.headers, n=1)
            hint = f"; the closest is {close[0]!r}" if close else ""
            raise self._error(f"There is no tensor {name!r} in {', '.join(map(str, self.paths))}{hint}.")
        path = self._path_of[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError) as cause:
            raise self._error(f"{path}: tensor {name!r} cannot be read ({cause}). Download it again.") from cause
