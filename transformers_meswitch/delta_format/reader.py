"""Opening delta repos: local folders or the Hub, one weight file or several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from ..configuration import MESwitchExpertConfig
from ..errors import DeltaFormatError
from .header import parse_json, read_header
from .location import RepoLocation, find_weights, is_plain_path
from .spec import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, ModuleRecord
from .tensor_files import TensorFiles
from .validate import check_config, check_headers, check_values

__all__ = ["Delta", "DeltaFiles", "check_delta", "open_delta", "resolve_delta"]

#: transformers names the index of a sharded adapter as it names that of a full checkpoint.
_CANDIDATES = (ADAPTER_WEIGHTS_NAME, f"{ADAPTER_WEIGHTS_NAME}.index.json", "model.safetensors.index.json")
_PICKLES = ("adapter_model.bin",)


@dataclass(frozen=True)
class DeltaFiles:
    """Where the files of a delta repo are on this machine.

    Attributes:
        repo: folder or Hub id, as given.
        directory: folder of ``adapter_config.json``.
        config_path: ``adapter_config.json``.
        weight_paths: the safetensors file, or all shards.
        revision: commit that the files came from (`None` for a folder).
        location: how to reach further files of the same commit.
    """

    repo: str
    directory: Path
    config_path: Path
    weight_paths: list[Path]
    revision: str | None = None
    location: RepoLocation | None = field(default=None, repr=False, compare=False)

    def asset(self, name: str) -> Path | None:
        """Path of another file of the repo (``tokenizer.json``), fetched if need be; `None` if there is none.

        Raises:
            DeltaFormatError: the name leads out of the repo, or the Hub cannot be reached.
        """
        if not is_plain_path(name):
            raise DeltaFormatError(f"{name!r} is not the name of a file inside {self.repo}.")
        if self.location is not None:
            return self.location.find(name)
        path = self.directory / name
        return path if path.is_file() else None


class Delta:
    """An opened delta: its configuration, and its tensors read lazily.

    Opening checks the configuration and that the weight files hold exactly the announced tensors. Values are
    checked by :func:`check_delta`.

    Args:
        files: where the delta is.

    Raises:
        FormatVersionError: a later format version than this release reads.
        DeltaFormatError: anything malformed, naming the file and the tensor.
    """

    def __init__(self, files: DeltaFiles) -> None:
        self.files = files
        raw = parse_json(_read(files.config_path), str(files.config_path))
        #: Canonical module name to record.
        self.records: dict[str, ModuleRecord] = check_config(raw)
        known = {f.name for f in fields(MESwitchExpertConfig)}
        try:
            self.config = MESwitchExpertConfig(**{name: value for name, value in raw.items() if name in known})
        except DeltaFormatError:
            raise
        except (TypeError, ValueError) as cause:
            raise DeltaFormatError(f"{files.config_path} is not a valid configuration: {cause}") from cause
        self._tensors = TensorFiles(files.weight_paths)
        check_headers(self.records, self._tensors.headers)

    def keys(self) -> Iterator[str]:
        """Names of the tensors on disk, sorted."""
        return iter(self._tensors)

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor on the CPU, mapped from its file. Clone it before writing to it.

        Raises:
            DeltaFormatError: no such tensor, or the file cannot be read.
        """
        return self._tensors.tensor(key)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name on disk, mapped from their files.

        Raises:
            DeltaFormatError: a file cannot be read.
        """
        return {key: self.tensor(key) for key in self.keys()}

    def asset(self, name: str) -> Path | None:
        """See :meth:`DeltaFiles.asset`."""
        return self.files.asset(name)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise DeltaFormatError(f"{path} cannot be read: {cause}") from cause


def resolve_delta(
    repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> DeltaFiles:
    """Find the files of a delta repo, fetching them from the Hub if need be; all come from one commit.

    Args:
        repo: local folder or Hub id.
        revision: branch, tag or commit.
        subfolder: folder inside the repo.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        force_download: fetch again what is in the cache.

    Raises:
        DeltaFormatError: no such repo, no ``adapter_config.json``, no safetensors (pickles are never opened), a
            missing shard.
    """
    location = RepoLocation(
        os.fspath(repo), revision, subfolder, token, cache_dir, local_files_only, force_download, DeltaFormatError
    )
    config_path = location.find(ADAPTER_CONFIG_NAME)
    if config_path is None:
        raise DeltaFormatError(
            f"{location} has no {ADAPTER_CONFIG_NAME}{location.offline_hint()}, so it is not a delta repo, or saving "
            "it was interrupted. Compress the expert again, or check the path, revision and subfolder."
        )
    location = location.pinned(config_path)
    weight_paths = find_weights(location, _CANDIDATES, _PICKLES)
    # A file without tensors stands beside shards, for loaders that look for its name.
    if weight_paths[0].name == ADAPTER_WEIGHTS_NAME and not read_header(weight_paths[0]):
        weight_paths = find_weights(location, _CANDIDATES[1:], ())
    found_revision = None if location.is_local else location.revision
    return DeltaFiles(location.repo, config_path.parent, config_path, weight_paths, found_revision, location)


def open_delta(files: DeltaFiles | str | os.PathLike[str]) -> Delta:
    """Open a delta: parse its configuration, check that its tensors are the announced ones. Values are read lazily.

    Args:
        files: from :func:`resolve_delta`; a folder or Hub id is resolved first.

    Raises:
        FormatVersionError: a later format version than this release reads.
        DeltaFormatError: anything malformed, naming the file and the tensor.
    """
    return Delta(files if isinstance(files, DeltaFiles) else resolve_delta(files))


def check_delta(delta: Delta) -> None:
    """Check the values of an opened delta (:func:`~.validate.check_values`); its headers were checked on opening.

    Raises:
        DeltaFormatError: naming every offending tensor.
    """
    check_values(delta.records, delta.tensor)
