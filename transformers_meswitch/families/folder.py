"""A family's folder, changed so that an interruption leaves the old family, the new one, or none that loads.

New files are written into a hidden folder beside the old ones. Then ``config.json``, which makes it a family, is
removed, the rest is moved into place, and the new ``config.json`` comes last.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import urllib.parse
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ..configuration import MESwitchFamilyConfig
from ..delta_format.folder_lock import FolderLock
from ..delta_format.header import parse_json
from ..errors import OutputFolderError

__all__ = ["CONFIG", "EXPERTS", "check_family_folder", "expert_folder", "install", "staging_folder"]

#: Folder of a family's own deltas.
EXPERTS = "experts"
CONFIG = "config.json"
#: Longest name of an expert's folder; file systems allow 255 bytes, Windows 260 for a whole path.
_FOLDER_LENGTH = 100


def check_family_folder(folder: Path) -> None:
    """Refuse a folder that a family cannot be saved in; over another model, ``config.json`` would be lost.

    Raises:
        OutputFolderError: a file, or the folder of a model that is no family.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"{folder} is a file, so nothing can be saved in it. Give a folder.")
    path = folder / CONFIG
    if (
        path.is_file()
        and parse_json(path.read_bytes(), str(path)).get("model_type") != MESwitchFamilyConfig.model_type
    ):
        raise OutputFolderError(
            f"{folder} holds the config.json of a model that is no family; saving a family here would destroy it. "
            "Give another folder."
        )


def expert_folder(expert: str, taken: Collection[str]) -> str:
    """Folder of an expert inside a family: readable where that is possible, else told apart by a digest.

    Args:
        expert: its name.
        taken: folders of other experts.

    >>> expert_folder("math", []), expert_folder("Größe/1", [])
    ('experts/math', 'experts/Gr%C3%B6%C3%9Fe%2F1')
    """
    name = urllib.parse.quote(expert, safe="-_.")
    # Windows and macOS do not tell upper from lower case.
    collides = any(path.rpartition("/")[2].lower() == name.lower() for path in taken)
    if len(name) > _FOLDER_LENGTH or collides:
        digest = hashlib.sha256(expert.encode()).hexdigest()[:16]
        name = f"{name[: _FOLDER_LENGTH - len(digest) - 1]}-{digest}"
    return f"{EXPERTS}/{name}"


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder for new files, inside a family's folder that nobody else writes into meanwhile.

    Raises:
        OutputFolderError: somebody else is writing into the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    staging = folder / f".{uuid.uuid4().hex}"
    try:
        staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()


def install(staging: Path, deltas: Collection[str], removed: Collection[str] = (), stale: Iterable[Path] = ()) -> None:
    """Move new files out of their :func:`staging_folder` to where they belong.

    Args:
        staging: the folder; what it holds replaces what has the same name.
        deltas: paths in it of deltas, as ``experts/<folder>``.
        removed: paths in the family of deltas that go.
        stale: further files that go.
    """
    folder = staging.parent
    (folder / CONFIG).unlink(missing_ok=True)
    for path in {*deltas, *removed}:
        if (folder / path).is_dir():
            shutil.rmtree(folder / path)
    for path in deltas:
        (folder / path).parent.mkdir(exist_ok=True)
        (staging / path).replace(folder / path)
    shutil.rmtree(staging / EXPERTS, ignore_errors=True)
    for file in stale:
        file.unlink()
    for file in sorted(staging.iterdir(), key=lambda f: f.name == CONFIG):
        if (folder / file.name).is_dir():  # a tokenizer's folder of chat templates
            shutil.rmtree(folder / file.name)
        file.replace(folder / file.name)
