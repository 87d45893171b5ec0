"""The folder that an exported expert is written to, and what it takes over from the delta beside weights."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cards import hub_id
from ..compression.assets import find_assets, license_of
from ..delta_format.asset_files import GENERATION_CONFIG, TEMPLATE_FOLDER
from ..delta_format.folder_lock import PARTIAL_SUFFIX
from ..delta_format.location import RepoLocation
from ..errors import OutputFolderError
from ..verification.inputs import folder_of
from .inputs import Inputs

__all__ = [
    "DTYPES",
    "Origin",
    "check_output",
    "check_room",
    "copy_assets",
    "find_expert_assets",
    "license_of_delta",
    "new_folder",
    "origin_of",
    "tokenizer_folder",
]

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
def new_folder(output: Path, config_name: str) -> Iterator[Path]:
    """A folder to write into, whose files are in ``output`` in the end; if anything goes wrong, nothing of it is left.

    Args:
        output: a folder that is new, or there and empty (a mount, say), to which the files are then moved one by one.
        config_name: of these files, the one without which nothing loads: it comes last.
    """
    output = output.resolve()
    # What is there stays there: it may be somebody's working directory, or the root of a disk.
    there = output.exists()
    made = [] if there else [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = (output if there else output.parent) / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
    partial.mkdir()
    moved: list[Path] = []
    try:
        yield partial
        if there:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == config_name):
                moved.append(output / path.name)
                path.rename(moved[-1])
            partial.rmdir()
        else:
            partial.rename(output)
    except BaseException:
        for path in (*moved, partial):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def find_expert_assets(inputs: Inputs) -> list[Path]:
    """Tokenizer, chat templates and generation config of a delta; the base's tokenizer where it has none."""
    assets = find_assets(_location(inputs))
    if not any(map(_is_tokenizer, assets)):
        has_template = any(_is_chat_template(path) for path in assets)
        for path in find_assets(inputs.base.location):
            if _is_tokenizer(path) or (_is_chat_template(path) and not has_template):
                assets.append(path)
    return assets


def tokenizer_folder(inputs: Inputs) -> Path | None:
    """The folder with the files of the tokenizer that :func:`find_expert_assets` finds, if there is one."""
    return next((path.parent for path in find_expert_assets(inputs) if _is_tokenizer(path)), None)


def _is_chat_template(path: Path) -> bool:
    return path.parent.name == TEMPLATE_FOLDER or path.stem == "chat_template"


def _is_tokenizer(path: Path) -> bool:
    return path.name != GENERATION_CONFIG and not _is_chat_template(path)


def copy_assets(inputs: Inputs, folder: Path) -> None:
    """Copy what :func:`find_expert_assets` finds."""
    for path in find_expert_assets(inputs):
        target = folder / TEMPLATE_FOLDER / path.name if path.parent.name == TEMPLATE_FOLDER else folder / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


@dataclass(frozen=True)
class Origin:
    """How an exported expert names what it came from.

    Attributes:
        base: Hub id or absolute folder of the base; `None` for one in a subfolder on the Hub, which has no such name.
        base_revision: its commit, where it is on the Hub.
        delta: Hub id of the delta's repo, where it is on the Hub.
        subfolder: folder of the delta inside it.
    """

    base: str | None
    base_revision: str | None
    delta: str | None
    subfolder: str | None


def origin_of(inputs: Inputs) -> Origin:
    """Name the base that was used, or the Hub's where a local copy stood for it, and the delta."""
    base, delta, config = inputs.base.location, _location(inputs), inputs.delta.config
    stated = hub_id(config.base_model_name_or_path)
    if not base.is_local:
        name, revision = (None if base.subfolder else base.repo), base.revision
    elif stated is not None and config.base_fingerprint is not None:  # compared, so the same bytes
        name, revision = stated, config.revision
    else:
        name, revision = os.path.abspath(folder_of(inputs.base)), None
    return Origin(name, revision, None if delta.is_local else delta.repo, delta.subfolder)


def license_of_delta(inputs: Inputs) -> str | None:
    """Hub licence identifier in the delta's card, else in the base's."""
    return license_of(_location(inputs), inputs.base.location)


def _location(inputs: Inputs) -> RepoLocation:
    location = inputs.delta.files.location
    assert location is not None  # a delta that was looked for has one
    return location
