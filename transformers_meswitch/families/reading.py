"""A family's configuration, from a folder or the Hub."""

from __future__ import annotations

from dataclasses import replace

from transformers import AutoConfig

from ..configuration import MESwitchFamilyConfig
from ..delta_format.location import RepoLocation
from ..errors import CheckpointError

__all__ = ["base_of_family", "read_family"]


def read_family(location: RepoLocation) -> tuple[RepoLocation, MESwitchFamilyConfig]:
    """A family's ``config.json``, and the repo at the commit that it is of.

    Raises:
        CheckpointError: the repo is a plain model.
        MESwitchError: of the location's type: no such repo or revision, no access, or no ``config.json``.
    """
    path = location.require("config.json")
    location = location.pinned(path)
    config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    if not isinstance(config, MESwitchFamilyConfig):
        raise CheckpointError(
            f"{location} is a plain model (model_type {config.model_type!r}), expected a family with experts. Name "
            "the delta repo itself, or the family that names it."
        )
    return location, config


def base_of_family(family: RepoLocation, config: MESwitchFamilyConfig) -> RepoLocation | None:
    """Where a family's base is; ``./path`` is inside the family repo. `None` if it names none."""
    base = config.base_model_name_or_path
    if not base:
        return None
    if base.startswith("./"):
        inside = "/".join(filter(None, (family.subfolder, base[2:].rstrip("/"), config.base_subfolder)))
        return replace(family, subfolder=inside)
    return replace(family, repo=base, revision=config.base_revision, subfolder=config.base_subfolder)
