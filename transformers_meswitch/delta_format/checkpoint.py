"""A base or fine-tune checkpoint as its files hold it, read tensor by tensor without building the model."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import CheckpointError
from .location import RepoLocation, find_weights
from .tensor_files import TensorFiles

__all__ = ["Checkpoint", "resolve_checkpoint"]

_CANDIDATES = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Checkpoint:
    """The safetensors files of a checkpoint.

    Args:
        repo: folder or Hub id, for messages.
        paths: all its safetensors files.
        revision: commit, branch or tag that the files came from; `None` for a folder.

    Raises:
        CheckpointError: a missing, truncated or inconsistent file.
    """

    def __init__(self, repo: str, paths: list[Path], revision: str | None = None) -> None:
        self.repo = repo
        self.paths = paths
        self.revision = revision
        self._files = TensorFiles(paths, CheckpointError)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, as the checkpoint spells them, sorted."""
        return list(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor, from the header alone; `KeyError` if there is none of that name."""
        return self._files.headers[name].shape

    def dtype(self, name: str) -> str:
        """Safetensors name of a tensor's dtype (``"BF16"``); `KeyError` if there is none of that name."""
        return self._files.headers[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in its own dtype, read from the file into memory of its own.

        Raises:
            CheckpointError: no such tensor, or it cannot be read.
        """
        return self._files.read(name)

    def announce(self, name: str) -> None:
        """Have the system fetch a tensor from the disk meanwhile; `KeyError` if there is none of that name."""
        self._files.announce(name)


def resolve_checkpoint(
    repo: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Checkpoint:
    """Find the safetensors files of a checkpoint, one file or sharded, fetching them from the Hub if need be.

    Args:
        repo: local folder or Hub id.
        revision: branch, tag or commit.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        subfolder: folder inside the repo.

    Raises:
        CheckpointError: no such repo, no safetensors (a repo with only pickles is refused, they are never opened), a
            missing or truncated file.
    """
    location = RepoLocation(
        os.fspath(repo), revision, subfolder, token, cache_dir, local_files_only, error=CheckpointError
    )
    config = location.find("config.json")
    if config is not None:
        location = location.pinned(config)
    paths = find_weights(location, _CANDIDATES, _PICKLES)
    return Checkpoint(location.repo, paths, None if location.is_local else location.revision)
