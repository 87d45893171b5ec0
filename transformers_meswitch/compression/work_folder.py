"""The modules of a delta that are finished, in memory or on disk, so that a run that was killed can be taken up again.

``<output>.partial`` beside the delta repo to be holds ``request.json``, which says what is being made, and a
safetensors file for each finished module, moved into place when it is whole. It is removed when the delta is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..delta_format.serialize import write_tensors
from ..delta_format.spec import ModuleRecord, parse_record, tensor_key
from ..delta_format.tensor_files import TensorFiles
from ..delta_format.validate import check_headers, tensor_headers
from ..errors import CompressionError, MESwitchError

__all__ = [
    "FinishedModules",
    "ModulesInMemory",
    "WorkFolder",
    "partial_folder",
    "request_folder",
    "work_folder",
    "write_whole",
]

logger = logging.getLogger(__name__)

_REQUEST, _LOCK, _SUFFIX, _UNFINISHED = "request.json", ".lock", ".safetensors", ".unfinished"


class FinishedModules(Protocol):
    """Where the driver puts modules that are compressed.

    Attributes:
        records: canonical module name to record, of all that are there.
    """

    records: dict[str, ModuleRecord]

    def add(self, name: str, record: ModuleRecord, leaves: Mapping[str, Tensor]) -> None:
        """Take a module; ``leaves`` by name, on any device."""


class ModulesInMemory:
    """Modules in memory; see :class:`FinishedModules`.

    Attributes:
        tensors: name on disk to tensor, on the CPU.
    """

    def __init__(self) -> None:
        self.records: dict[str, ModuleRecord] = {}
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, record: ModuleRecord, leaves: Mapping[str, Tensor]) -> None:
        """See :meth:`FinishedModules.add`."""
        self.records[name] = record
        self.tensors.update({tensor_key(name, leaf): tensor.cpu() for leaf, tensor in leaves.items()})


class WorkFolder:
    """Modules on disk, each in a file of its own; see :class:`FinishedModules`.

    Args:
        folder: an existing folder; modules that an earlier run finished are found in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.records: dict[str, ModuleRecord] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix == _UNFINISHED:
                path.unlink()
            elif path.suffix == _SUFFIX:
                record = _read_record(path)
                if record is None:  # of a machine that went down; written anew
                    path.unlink()
                else:
                    self.records[path.name.removesuffix(_SUFFIX)] = record

    def add(self, name: str, record: ModuleRecord, leaves: Mapping[str, Tensor]) -> None:
        """Write a module; when this returns it survives the death of the process and of the machine.

        Raises:
            OSError: the disk is full or not writable.
        """
        tensors = {tensor_key(name, leaf): tensor for leaf, tensor in leaves.items()}
        write_whole(self._folder / f"{name}{_SUFFIX}", tensors, {"record": json.dumps(asdict(record))})
        self.records[name] = record

    def tensors(self) -> TensorFiles:
        """All tensors by name on disk, read one at a time.

        Raises:
            DeltaFormatError: a file that cannot be read any more.
        """
        return TensorFiles([self._folder / f"{name}{_SUFFIX}" for name in self.records])


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file into a work folder, all of it or nothing; it survives the death of the machine.

    Args:
        path: the file; one that is there is replaced.
        tensors: its tensors by name, on any device.
        metadata: the file's ``__metadata__``.

    Raises:
        OSError: the disk is full or not writable; an earlier file is as it was.
    """
    partial = path.with_suffix(_UNFINISHED)
    try:
        write_tensors(partial, tensor_headers(tensors), tensors.__getitem__, metadata)
        # Windows syncs only what is open for writing.
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_record(path: Path) -> ModuleRecord | None:
    """The record of a finished module; `None` if its file is not whole."""
    name = path.name.removesuffix(_SUFFIX)
    try:
        headers = TensorFiles([path]).headers
        with safe_open(path, framework="pt") as file:
            record = parse_record(name, json.loads((file.metadata() or {})["record"]))
        check_headers({name: record}, headers)
    except (MESwitchError, SafetensorError, OSError, ValueError, KeyError):
        return None
    return record


@contextmanager
def work_folder(output: Path, request: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """The modules of an output that are finished; see :func:`request_folder`, whose arguments and errors it has."""
    with request_folder(output, request) as folder:
        yield WorkFolder(folder)


@contextmanager
def request_folder(output: Path, request: Mapping[str, Any]) -> Iterator[Path]:
    """The work folder of an output, for this process alone while the context lasts.

    What an earlier run of the same request finished is found in it; what is left of another request is removed.
    Leaving the context normally, or with a :class:`MESwitchError` (the request cannot succeed), removes the folder;
    any other end leaves it for the next run.

    Args:
        output: the delta repo to be.
        request: everything that determines the delta, as JSON; requests are the same if this is.

    Raises:
        CompressionError: another process works on the same output, or the folder is not a work folder.
        OSError: the disk is full or not writable.
    """
    folder = partial_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CompressionError(
            f"Another process is working on {output} ({folder} is locked). Wait for it, or give another output."
        ) from error
    try:
        _prepare(folder, request)
        try:
            yield folder
        except MESwitchError:
            _remove(folder)
            raise
        _remove(folder)
    finally:
        lock.release()
        _remove_lock(folder)


def partial_folder(output: Path) -> Path:
    """Where the work on an output is kept.

    >>> partial_folder(Path("deltas/math")).as_posix()
    'deltas/math.partial'
    """
    return output.with_name(f"{output.name}.partial")


def _prepare(folder: Path, request: Mapping[str, Any]) -> None:
    """Leave in a folder what an earlier run of the same request finished, and nothing else."""
    text = json.dumps(request, indent=2, sort_keys=True, default=str) + "\n"
    path, unfinished = folder / _REQUEST, folder / f"{_REQUEST}{_UNFINISHED}"
    unfinished.unlink(missing_ok=True)
    others = sorted(entry for entry in folder.iterdir() if entry.name != _LOCK)
    if others and not path.is_file():
        raise CompressionError(
            f"{folder} is where the work on this output would be kept, but it holds {others[0].name} and no "
            f"{_REQUEST}. Move it away, or give another output."
        )
    if others and path.read_text(encoding="utf-8") != text:
        logger.warning("%s holds unfinished work of another request; it is removed.", folder)
        # The request goes last, or a kill would leave a folder that is nobody's.
        for entry in sorted(others, key=lambda entry: entry.name == _REQUEST):
            entry.unlink()
    if not path.exists():
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)


def _remove(folder: Path) -> None:
    """Remove a work folder; the request goes last, or a kill would leave a folder that is nobody's."""
    for path in folder.iterdir():
        if path.name not in (_LOCK, _REQUEST):
            path.unlink()
    (folder / _REQUEST).unlink(missing_ok=True)


def _remove_lock(folder: Path) -> None:
    # After its release only, since Windows keeps the file while it is open. Another process may have it by now.
    with contextlib.suppress(OSError):
        if not (folder / _REQUEST).exists():
            (folder / _LOCK).unlink(missing_ok=True)
            folder.rmdir()
