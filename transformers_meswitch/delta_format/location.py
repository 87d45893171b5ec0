"""Where the files of a repo are: a local folder, or the Hub and its cache. Pickles are never fetched."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from ..errors import DeltaFormatError, MESwitchError
from .header import parse_json

__all__ = ["RepoLocation", "find_weights", "is_plain_path"]

#: Shards fetched at a time, as many as huggingface_hub's own ``snapshot_download`` does.
_DOWNLOADS = 8
_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


def is_plain_path(name: str) -> bool:
    """Whether a name from an untrusted file stays inside the folder it is joined to.

    >>> is_plain_path("adapter_model.safetensors"), is_plain_path("../secret"), is_plain_path("/etc/passwd")
    (True, False, False)
    """
    parts = name.split("/")
    return bool(name) and not any(c in name for c in "\\:\0") and all(part not in ("", ".", "..") for part in parts)


@dataclass(frozen=True)
class RepoLocation:
    """A repo and how to reach it.

    Attributes:
        repo: local folder, or Hub id.
        revision: branch, tag or commit on the Hub.
        subfolder: folder inside the repo.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network; also implied by ``HF_HUB_OFFLINE``.
        force_download: fetch again what is in the cache.
        error: type of the errors raised.
    """

    repo: str
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    error: type[MESwitchError] = DeltaFormatError

    def __str__(self) -> str:
        where = f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo
        return f"{where} (revision {self.revision})" if self.revision and not self.is_local else where

    @property
    def is_local(self) -> bool:
        """Whether the repo is a folder on this machine."""
        return os.path.isdir(self.repo)

    def find(self, filename: str) -> Path | None:
        """Path of a file of the repo, fetched if need be; `None` if the repo (or the cache, offline) lacks it.

        Raises:
            MESwitchError: of type ``error``: no such folder, no such repo or revision, no access, no network.
        """
        if self.is_local:
            path = Path(self.repo, self.subfolder or "", filename)
            return path if path.is_file() else None
        if os.path.isfile(self.repo) or os.path.isabs(self.repo) or self.repo.startswith((".", "~")):
            raise self.error(
                f"{self.repo} is not a folder. Give a Hub id (user/name) or an existing folder.{self.gguf_hint()}"
            )
        try:
            return Path(
                hf_hub_download(
                    self.repo,
                    filename,
                    subfolder=self.subfolder or None,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=None if self.cache_dir is None else os.fspath(self.cache_dir),
                    local_files_only=self.local_files_only,
                    force_download=self.force_download,
                )
            )
        except EntryNotFoundError as cause:
            # Without network a file that was never cached looks the same as one that does not exist.
            if isinstance(cause, LocalEntryNotFoundError) and not (self.local_files_only or is_offline_mode()):
                raise self.error(
                    f"{filename} of {self} is not in the cache and could not be fetched: {cause}"
                ) from cause
            return None
        except (OSError, HTTPError, HFValidationError) as cause:
            raise self.error(
                f"{filename} of {self} could not be fetched: {cause} Check the id, the revision and your access "
                "(`hf auth login`), or give the path of a local folder."
            ) from cause

    def list_folder(self, folder: str) -> list[str]:
        """Names of the files that lie directly in a folder of the repo, sorted; none if there is no such folder.

        Offline, those are listed that the cache has. Nothing is fetched.

        Raises:
            MESwitchError: of type ``error``: no such repo or revision, no access, or no network and nothing cached.
        """
        path = "/".join(filter(None, (self.subfolder, folder)))
        if self.is_local:
            return _file_names(Path(self.repo, path))
        try:
            if self.local_files_only or is_offline_mode():
                return self._list_cached(path)
            entries = HfApi(token=self.token).list_repo_tree(self.repo, path, revision=self.revision)
            return sorted(entry.path.rpartition("/")[2] for entry in entries if isinstance(entry, RepoFile))
        except (LocalEntryNotFoundError, RemoteEntryNotFoundError):
            return []
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as cause:
            raise self.error(
                f"{path} of {self} could not be listed: {cause} Check the id, the revision and your access "
                "(`hf auth login`), or give the path of a local folder."
            ) from cause
        except (OSError, HTTPError) as cause:
            # As for single files, the cache stands in for a Hub that does not answer.
            try:
                return self._list_cached(path)
            except LocalEntryNotFoundError:
                raise self.error(f"{path} of {self} is not in the cache and could not be listed: {cause}") from cause

    def _list_cached(self, path: str) -> list[str]:
        cache_dir = None if self.cache_dir is None else os.fspath(self.cache_dir)
        snapshot = snapshot_download(self.repo, revision=self.revision, cache_dir=cache_dir, local_files_only=True)
        return _file_names(Path(snapshot, path))

    def require(self, filename: str) -> Path:
        """As :meth:`find`, for a file that must exist.

        Raises:
            MESwitchError: of type ``error``, naming the file and the repo.
        """
        path = self.find(filename)
        if path is None:
            raise self.error(f"{self} has no file {filename}{self.offline_hint()}.{self.gguf_hint()}")
        return path

    def offline_hint(self) -> str:
        """What to add to "there is no such file" where only the cache was searched."""
        if self.is_local or not (self.local_files_only or is_offline_mode()):
            return ""
        return " in the local cache (offline: allow the network once to fetch it)"

    def gguf_hint(self) -> str:
        """What to add to "there is no such file" where the repo holds GGUF files."""
        named_so = "gguf" in os.path.basename(self.repo).lower()
        if not named_so and not any(Path(self.repo, self.subfolder or "").glob("*.gguf")):
            return ""
        return (
            " GGUF files hold quantised weights; give the unquantised checkpoint that they were made from, in "
            "safetensors."
        )

    def pinned(self, fetched: Path) -> RepoLocation:
        """The same repo at the commit that ``fetched`` came from, so that further files match it."""
        commit = None if self.is_local else _COMMIT.search(str(fetched))
        return replace(self, revision=commit[1]) if commit else self


def _file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _shards(location: RepoLocation, index: Path) -> list[Path]:
    weight_map = parse_json(index.read_bytes(), str(index), location.error).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise location.error(f"{index} has no weight_map from tensor names to files.")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or not is_plain_path(name) or not name.endswith(".safetensors"):
            raise location.error(f"{index} names the shard {name!r}, expected a .safetensors file beside it.")
    # A connection seldom carries all that the line does, and the Hub answers each request after a while.
    pool = ThreadPoolExecutor(_DOWNLOADS)
    try:
        return list(pool.map(location.require, sorted(set(names))))
    finally:
        pool.shutdown(cancel_futures=True)  # of those that a missing one makes useless


def find_weights(location: RepoLocation, candidates: tuple[str, ...], pickles: tuple[str, ...]) -> list[Path]:
    """The safetensors files of a repo.

    Args:
        location: the repo.
        candidates: file names in order of preference; a ``.index.json`` stands for all the shards it names.
        pickles: files that explain why no candidate is there; looked for, never opened.

    Raises:
        MESwitchError: of type ``location.error``: there are no candidates, or only pickles, or a shard is missing or
            lies outside the repo.
    """
    for name in candidates:
        path = location.find(name)
        if path is not None:
            return _shards(location, path) if name.endswith(".index.json") else [path]
    wanted = " or ".join(candidates)
    for name in pickles:
        if location.find(name) is not None:
            raise location.error(
                f"{location} has {name} but no {wanted}. Pickles can run code and are never opened here. Convert it "
                "once, where you trust it: load it with transformers or PEFT and save_pretrained() it, which writes "
                "safetensors; for a Hub repo also https://huggingface.co/spaces/safetensors/convert."
            )
    raise location.error(f"{location} has no {wanted}{location.offline_hint()}.{location.gguf_hint()}")
