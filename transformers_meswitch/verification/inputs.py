"""The three repos that are measured, or trained, together: a base, an expert of it, and the expert's delta."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..compression.sources import Source, locate
from ..delta_format.fingerprint import check_checkpoint
from ..delta_format.location import RepoLocation
from ..delta_format.reader import Delta, check_delta, open_delta, resolve_delta
from ..errors import CheckpointError

__all__ = ["Inputs", "folder_of", "open_inputs"]


@dataclass(frozen=True)
class Inputs:
    """Base, expert and delta, found and checked.

    Attributes:
        base: the base's files.
        expert: the fine-tune's.
        delta: the opened delta, whose values are sound.
    """

    base: Source
    expert: Source
    delta: Delta


def open_inputs(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    *,
    base_revision: str | None = None,
    expert_revision: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    full_fingerprint: bool = False,
) -> Inputs:
    """Find the three repos, and make sure that the delta is whole and of this base.

    Args:
        base: folder or Hub id of the base's checkpoint.
        expert: folder or Hub id of the fine-tune's.
        delta: folder or Hub id of the delta repo.
        base_revision: branch, tag or commit of the base; by default what the delta names, if it names this base.
        expert_revision: branch, tag or commit of the expert.
        revision: branch, tag or commit of the delta repo.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        full_fingerprint: compare every byte of the base.

    Raises:
        BaseMismatchError: the delta was formed against another base.
        CheckpointError: a missing, truncated or unreadable checkpoint.
        CompressionError: a quantised checkpoint.
        DeltaFormatError: the delta is malformed.
    """
    opened = open_delta(
        resolve_delta(delta, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    )
    check_delta(opened)
    if base_revision is None:
        base_revision = opened.config.revision_of(base)

    def located(repo: str | os.PathLike[str], wanted: str | None) -> Source:
        return locate(
            RepoLocation(os.fspath(repo), wanted, None, token, cache_dir, local_files_only, error=CheckpointError)
        )

    of_base, of_expert = located(base, base_revision), located(expert, expert_revision)
    expected, paths = opened.config.base_fingerprint, of_base.checkpoint.paths
    check_checkpoint(expected, paths, str(of_base.location), full=full_fingerprint)
    return Inputs(of_base, of_expert, opened)


def folder_of(source: Source) -> str:
    """The folder, of the user or of the Hub's cache, that holds the configuration and the weights found."""
    return str(source.checkpoint.paths[0].parent)
