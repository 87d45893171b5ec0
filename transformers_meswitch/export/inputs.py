"""Finding a delta, of its own repo or of a family's, and the base that it belongs on."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..compression.sources import Source, locate
from ..configuration import MESwitchFamilyConfig, reference_in_family
from ..delta_format.fingerprint import check_checkpoint
from ..delta_format.header import parse_json
from ..delta_format.location import RepoLocation, is_plain_path
from ..delta_format.reader import Delta, check_delta, open_delta, resolve_delta
from ..delta_format.spec import ADAPTER_CONFIG_NAME
from ..errors import CheckpointError, ExpertNotFoundError
from ..families.reading import base_of_family, read_family

__all__ = ["Inputs", "open_inputs", "split_expert"]


@dataclass(frozen=True)
class Inputs:
    """What an expert is made of.

    Attributes:
        base: the base's files.
        delta: the opened delta, whose values are sound and whose base this is.
    """

    base: Source
    delta: Delta


def split_expert(source: str) -> tuple[str, str | None]:
    """A delta repo, or the family and the expert that ``FAMILY:EXPERT`` names.

    Args:
        source: folder or Hub id, with or without ``:EXPERT``. What is a folder as it stands is one.

    >>> split_expert("me/mistral-family:math"), split_expert("me/math-delta")
    (('me/mistral-family', 'math'), ('me/math-delta', None))
    """
    family, colon, expert = source.rpartition(":")
    if not colon or not family or not expert or "/" in expert or "\\" in expert or Path(source).is_dir():
        return source, None
    return family, expert


def open_inputs(
    source: str | os.PathLike[str],
    expert: str | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Inputs:
    """Find a delta and its base, and make sure that they are whole and belong together.

    Args:
        source: folder or Hub id of a delta repo; of a family repo where ``expert`` is given.
        expert: name of an expert of the family.
        base: folder or Hub id of the base; by default what the family, or else the delta, names.
        base_revision: branch, tag or commit of the base; by default what is named beside it.
        revision: branch, tag or commit of the delta or family repo.
        subfolder: folder inside it.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.

    Raises:
        BaseMismatchError: the delta was formed against another base.
        CheckpointError: no such family or base; a family without the name of an expert; a missing, truncated or
            unreadable checkpoint.
        CompressionError: the base is quantised.
        DeltaFormatError: the delta is malformed.
        ExpertNotFoundError: the family has no such expert.
    """
    download: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    repo, family_base = os.fspath(source), None
    if expert is not None:
        family, config = read_family(RepoLocation(repo, revision, subfolder, **download, error=CheckpointError))
        experts = config.experts or {}
        if expert not in experts:
            known = ", ".join(map(repr, experts)) or "none"
            raise ExpertNotFoundError(f"The family {family} has no expert {expert!r}. It has: {known}.")
        reference = reference_in_family(repo, experts[expert], {"revision": family.revision, "subfolder": subfolder})
        repo, revision, subfolder = str(reference["repo"]), reference.get("revision"), reference.get("subfolder")
        family_base = base_of_family(family, config)
    else:
        _refuse_family(RepoLocation(repo, revision, subfolder, **download, error=CheckpointError))
    delta = open_delta(resolve_delta(repo, revision=revision, subfolder=subfolder, **download))
    check_delta(delta)
    if base is not None:
        pinned = base_revision or delta.config.revision_of(base)
        location = RepoLocation(os.fspath(base), pinned, None, **download, error=CheckpointError)
    else:
        location = family_base or _stated_base(delta, download)
        location = replace(location, revision=base_revision or location.revision)
    found = locate(location)
    check_checkpoint(delta.config.base_fingerprint, found.checkpoint.paths, str(found.location))
    return Inputs(found, delta)


def _refuse_family(location: RepoLocation) -> None:
    """Say how to name an expert where a family was named alone."""
    if location.find(ADAPTER_CONFIG_NAME) is not None:
        return
    path = location.find("config.json")
    content = {} if path is None else parse_json(path.read_bytes(), str(path), CheckpointError)
    if content.get("model_type") == MESwitchFamilyConfig.model_type:
        experts = ", ".join(map(str, content.get("experts") or ())) or "none"
        raise CheckpointError(
            f"{location} is a family; name one of its experts, {experts}: FAMILY:EXPERT on the command line, "
            "expert= in Python."
        )


def _stated_base(delta: Delta, download: dict[str, Any]) -> RepoLocation:
    """The base that a delta names; a relative path is relative to where the delta is."""
    stated, location = delta.config.base_model_name_or_path, delta.files.location
    assert stated is not None  # a config without is refused
    if stated.startswith(("./", "../")):
        inside = delta.files.directory / stated
        if inside.is_dir():
            return RepoLocation(str(inside.resolve()), **download, error=CheckpointError)
        if location is not None and not location.is_local:
            subfolder = posixpath.normpath(posixpath.join(location.subfolder or "", stated))
            if is_plain_path(subfolder):
                return replace(location, subfolder=subfolder, error=CheckpointError)
        raise CheckpointError(
            f"{delta.files.config_path} names the base {stated!r}, and there is none at that place. Give it: "
            "base=, or --base on the command line."
        )
    return RepoLocation(stated, delta.config.revision, None, **download, error=CheckpointError)
