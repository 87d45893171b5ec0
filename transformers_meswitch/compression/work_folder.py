"""The modules of a delta that are finished, in memory or on disk, so that a run that was killed can be taken up again.

``<output>.partial`` beside the delta repo to be holds ``request.json``, which says what is being made, and a
safetensors file for each finished module, moved into place when it is whole. Where a budget is to choose between
several candidates of a module, each has a file of its own, and so has a linear that is fitted once more after the
choice. The folder is removed when the delta is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..delta_format.serialize import write_tensors
from ..delta_format.spec import LinearRecord, ModuleRecord, parse_record, tensor_key
from ..delta_format.tensor_files import TensorFiles
from ..delta_format.validate import check_headers, tensor_headers
from ..errors import BudgetError, CheckpointError, CompressionError, MESwitchError

__all__ = [
    "Candidate",
    "Codes",
    "FinishedModules",
    "ModulesInMemory",
    "WorkFolder",
    "codes_of",
    "disk_errors",
    "partial_folder",
    "request_folder",
    "work_folder",
    "write_whole",
]

logger = logging.getLogger(__name__)

_REQUEST, _LOCK, _SUFFIX, _UNFINISHED = "request.json", ".lock", ".safetensors", ".unfinished"
#: Between a module's name and what tells its candidates apart; in no module's name.
_OF = "@"
#: In the place of what tells candidates apart: fitted once more, after the choice.
_REFIT = "refit"


class Codes(NamedTuple):
    """What tells the candidates of a linear apart.

    Attributes:
        bits: bits of one code.
        salient_channels: input channels in bfloat16.
        column_steps: whether there is a step per input channel.
    """

    bits: int
    salient_channels: int
    column_steps: bool = False


@dataclass(frozen=True)
class Candidate:
    """One of the ways to store a linear.

    Attributes:
        record: its record.
        error: what of the layer's output it loses, see :func:`~.candidates.output_error`.
        weight: how much a unit of such error hurts the model; the same for all candidates of a module.
    """

    record: LinearRecord
    error: float
    weight: float

    @property
    def codes(self) -> Codes:
        """What tells it from the other candidates."""
        return codes_of(self.record)

    @property
    def loss(self) -> float:
        """What the model loses by it."""
        return self.error * self.weight


def codes_of(record: LinearRecord) -> Codes:
    """How a linear is stored.

    >>> codes_of(LinearRecord(8, 8, 2, salient_channels=4))
    Codes(bits=2, salient_channels=4, column_steps=False)
    """
    return Codes(record.bits, record.salient_channels, record.column_step)


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

    Attributes:
        candidates: module name to its candidates by codes; those that were chosen are in ``records`` as well.
        refitted: names of linears that were fitted once more after the choice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.records: dict[str, ModuleRecord] = {}
        self.candidates: dict[str, dict[Codes, Candidate]] = {}
        self.refitted: set[str] = set()
        self._choice: str | None = None
        for path in sorted(folder.iterdir()):
            if path.suffix == _UNFINISHED:
                path.unlink()
            elif path.suffix == _SUFFIX:
                name, of, which = path.name.removesuffix(_SUFFIX).partition(_OF)
                if which == _REFIT:
                    continue  # of which choice is looked at when it is made
                found = _read_module(path, name, is_candidate=bool(of))
                if found is None:  # of a machine that went down; written anew
                    path.unlink()
                elif isinstance(found, Candidate):
                    self.candidates.setdefault(name, {})[found.codes] = found
                else:
                    self.records[name] = found

    def add(self, name: str, record: ModuleRecord, leaves: Mapping[str, Tensor]) -> None:
        """Write a module; when this returns it survives the death of the process and of the machine.

        Raises:
            OSError: the disk is full or not writable.
        """
        if self._choice is None:
            self._write(name, name, record, leaves, {})
        else:
            self._write(f"{name}{_OF}{_REFIT}", name, record, leaves, {"choice": self._choice})
            self.refitted.add(name)
        self.records[name] = record

    def add_candidate(self, name: str, candidate: Candidate, leaves: Mapping[str, Tensor]) -> None:
        """Write one of the ways to store a linear, as :meth:`add` does; it is no part of the delta until it is chosen.

        Raises:
            OSError: the disk is full or not writable.
        """
        # The shortest decimal form of a float is read back as that very float.
        metadata = {"error": repr(candidate.error), "weight": repr(candidate.weight)}
        self._write(_candidate_file(name, candidate.codes), name, candidate.record, leaves, metadata)
        self.candidates.setdefault(name, {})[candidate.codes] = candidate

    def choose(self, choice: Mapping[str, Codes]) -> None:
        """Make one candidate of each module the module of the delta, in the place of an earlier choice.

        Args:
            choice: for every module that has candidates the codes of one of them.
        """
        self.records |= {name: self.candidates[name][codes].record for name, codes in choice.items()}

    def begin_refits(self) -> None:
        """From now on, modules that are added take the place of those chosen, which stay.

        Those that an earlier run had refitted after the same choice are found, those after another are removed.
        """
        linears = sorted((n, codes_of(r)) for n, r in self.records.items() if isinstance(r, LinearRecord))
        self._choice = hashlib.sha256(json.dumps(linears).encode()).hexdigest()
        for path in self._folder.glob(f"*{_OF}{_REFIT}{_SUFFIX}"):
            name = path.name.partition(_OF)[0]
            found = _read_module(path, name, is_candidate=False, choice=self._choice)
            if found is None:
                path.unlink()
            else:
                self.refitted.add(name)

    def drop_refits(self) -> None:
        """Go back to what was chosen."""
        self.refitted.clear()

    def _write(
        self, file: str, name: str, record: ModuleRecord, leaves: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        tensors = {tensor_key(name, leaf): tensor for leaf, tensor in leaves.items()}
        write_whole(self._folder / f"{file}{_SUFFIX}", tensors, {"record": json.dumps(asdict(record)), **metadata})

    def read(self, name: str) -> tuple[ModuleRecord, dict[str, Tensor]]:
        """A finished module: its record, and its tensors by leaf name on the CPU.

        Raises:
            DeltaFormatError: a file that cannot be read any more.
        """
        record = self.records[name]
        files = TensorFiles([self._folder / f"{self._file_of(name)}{_SUFFIX}"])
        return record, {leaf: files.read(tensor_key(name, leaf)) for leaf in record.leaves()}

    def tensors(self) -> TensorFiles:
        """All tensors by name on disk, read one at a time.

        Raises:
            DeltaFormatError: a file that cannot be read any more.
        """
        return TensorFiles([self._folder / f"{self._file_of(name)}{_SUFFIX}" for name in self.records])

    def _file_of(self, name: str) -> str:
        record = self.records[name]
        if name in self.refitted:
            return f"{name}{_OF}{_REFIT}"
        if name not in self.candidates or not isinstance(record, LinearRecord):
            return name
        return _candidate_file(name, codes_of(record))


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


def _candidate_file(name: str, codes: Codes) -> str:
    return f"{name}{_OF}{codes.bits}-{codes.salient_channels}{'-columns' if codes.column_steps else ''}"


def _read_module(
    path: Path, name: str, *, is_candidate: bool, choice: str | None = None
) -> ModuleRecord | Candidate | None:
    """What a finished module's file holds; `None` if it is not whole, or refitted after another choice."""
    try:
        headers = TensorFiles([path]).headers
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        record = parse_record(name, json.loads(metadata["record"]))
        check_headers({name: record}, headers)
        if not is_candidate:
            return record if metadata.get("choice") == choice else None
        candidate = Candidate(cast(LinearRecord, record), float(metadata["error"]), float(metadata["weight"]))
        whole = math.isfinite(candidate.loss) and path.name == f"{_candidate_file(name, candidate.codes)}{_SUFFIX}"
    except (MESwitchError, SafetensorError, OSError, ValueError, KeyError, AttributeError):
        return None
    return candidate if whole else None


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
    any other end leaves it for the next run, as do a budget that cannot be kept (another may be, from the same fits)
    and a checkpoint that cannot be read any more, which may be a network disk's hiccup after hours of work.

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
        except (BudgetError, CheckpointError):
            raise
        except MESwitchError:
            _remove(folder)
            raise
        _remove(folder)
    finally:
        lock.release()
        _remove_lock(folder)


@contextmanager
def disk_errors(output: Path, error: type[MESwitchError]) -> Iterator[None]:
    """Say of a disk that is full or not writable how to go on.

    Args:
        output: the delta repo to be.
        error: type of the error raised.

    Raises:
        MESwitchError: of type ``error``, in the place of an ``OSError``.
    """
    try:
        yield
    except OSError as cause:
        raise error(
            f"Writing to {output} or {partial_folder(output)} failed: {cause}. What is finished is kept in the "
            "latter; make room, or the folder writable, and run the same command again to go on from there."
        ) from cause


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
