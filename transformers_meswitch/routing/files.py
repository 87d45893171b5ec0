"""A router on disk: ``router_config.json``, and ``router.safetensors`` where it has tensors. Never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..delta_format.header import parse_json
from ..delta_format.location import RepoLocation
from ..errors import RouterError

__all__ = [
    "FORMAT_VERSION",
    "ROUTER_CONFIG",
    "ROUTER_FILES",
    "ROUTER_TENSORS",
    "check_type",
    "read_config",
    "read_tensors",
    "write",
]

ROUTER_CONFIG, ROUTER_TENSORS = "router_config.json", "router.safetensors"
ROUTER_FILES = frozenset((ROUTER_CONFIG, ROUTER_TENSORS))
FORMAT_VERSION = 1


def write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a router's files into a folder; what is interrupted leaves no router rather than parts of two.

    The old config is removed before the tensors are replaced, and the new one comes last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new_config, new_tensors = folder / f".{ROUTER_CONFIG}", folder / f".{ROUTER_TENSORS}"
    content = {"format_version": FORMAT_VERSION, **config}
    try:
        new_config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if tensors:
            new_tensors.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        (folder / ROUTER_CONFIG).unlink(missing_ok=True)
        if tensors:
            os.replace(new_tensors, folder / ROUTER_TENSORS)
        else:
            (folder / ROUTER_TENSORS).unlink(missing_ok=True)
        os.replace(new_config, folder / ROUTER_CONFIG)
    finally:
        for unfinished in (new_config, new_tensors):
            unfinished.unlink(missing_ok=True)


def read_config(location: RepoLocation) -> tuple[dict[str, Any], RepoLocation]:
    """A router's config, and where its other files are at the very same commit.

    Raises:
        RouterError: there is none, it is no JSON object, or it is of a later format.
    """
    path = location.require(ROUTER_CONFIG)
    config = parse_json(path.read_bytes(), str(path), RouterError)
    version = config.pop("format_version", None)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise RouterError(f"{path}: format_version is {version!r}, expected 1. Train the router again.")
    if version > FORMAT_VERSION:
        raise RouterError(
            f"{path} is in format version {version} of routers; this release reads up to version {FORMAT_VERSION}. "
            "Upgrade transformers-meswitch."
        )
    return config, location.pinned(path)


def check_type(config: Mapping[str, Any], expected: str, location: RepoLocation) -> None:
    """Refuse the config of a router of another kind.

    Raises:
        RouterError: it is.
    """
    if config.get("router_type") != expected:
        raise RouterError(f"{location}: router_type is {config.get('router_type')!r}, expected {expected!r}.")


def read_tensors(location: RepoLocation) -> dict[str, Tensor]:
    """A router's tensors.

    Raises:
        RouterError: the file is missing or damaged.
    """
    path = location.require(ROUTER_TENSORS)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RouterError(f"{path} cannot be read as safetensors ({error}). Fetch it again.") from error
