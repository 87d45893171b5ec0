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

__all__ = ["FORMAT_VERSION", "ROUTER_CONFIG", "ROUTER_FILES", "ROUTER_TENSORS", "read_config", "read_tensors", "write"]

ROUTER_CONFIG, ROUTER_TENSORS = "router_config.json", "router.safetensors"
ROUTER_FILES = frozenset((ROUTER_CONFIG, ROUTER_TENSORS))
FORMAT_VERSION = 1


def write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a router's files into a folder; each replaces its old one whole, the config last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{ROUTER_TENSORS}"
    if tensors:
        unfinished.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        os.replace(unfinished, folder / ROUTER_TENSORS)
    else:
        (folder / ROUTER_TENSORS).unlink(missing_ok=True)
    content = {"format_version": FORMAT_VERSION, **config}
    unfinished = folder / f".{ROUTER_CONFIG}"
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / ROUTER_CONFIG)


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
