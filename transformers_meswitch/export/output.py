"""The folder that an exported expert is written to, and what it takes over from the delta beside weights."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..compression.assets import find_assets, license_of
from ..delta_format.asset_files import GENERATION_CONFIG, TEMPLATE_FOLDER
from ..delta_format.folder_lock import PARTIAL_SUFFIX
from ..delta_format.location import RepoLocation
from ..errors import OutputFolderError
from .inputs import Inputs

__all__ = ["DTYPES", "check_output", "check_room", "copy_assets", "license_of_delta", "new_folder"]

#: Safetensors names of the dtypes that weights can be asked for in.
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def check_output(output: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        OutputFolderError: it does, or is a file.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputFolderError(f"{output} exists and is not an empty folder. Give one that is new or empty.")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check_room(output: Path, needed: int) -> None:
    """Find out before the work whether its disk has room for a number of bytes.

    Raises:
        OutputFolderError: it has not.
    """
    free = shutil.disk_usage(_existing(output)).free
    if free < needed:
        raise OutputFolderError(
            f"What is to be written has {needed:,} bytes, and the disk of {output} has {free:,} left. Make room, "
            "or give a folder on another disk."
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its place in the end, and is removed if anything goes wrong."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.absolute().parent / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
    partial.mkdir()
    try:
        yield partial
        if output.exists():
            output.rmdir()  # only if it is still empty
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_assets(inputs: Inputs, folder: Path) -> None:
    """Copy tokenizer, chat templates and generation config; the base's tokenizer where the expert has none."""
    assets = find_assets(_location(inputs))
    if not any(path.name != GENERATION_CONFIG for path in assets):
        assets += [path for path in find_assets(inputs.base.location) if path.name != GENERATION_CONFIG]
    for path in assets:
        target = folder / TEMPLATE_FOLDER / path.name if path.parent.name == TEMPLATE_FOLDER else folder / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def license_of_delta(inputs: Inputs) -> str | None:
    """Hub licence identifier in the delta's card, else in the base's."""
    return license_of(_location(inputs), inputs.base.location)


def _location(inputs: Inputs) -> RepoLocation:
    location = inputs.delta.files.location
    assert location is not None  # a delta that was looked for has one
    return location
