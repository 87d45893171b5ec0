"""Rows of text, as calibration and routers read them: of a ``.txt`` or ``.jsonl`` file, or of a data set."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import MESwitchError

__all__ = ["check_rows", "is_text_file", "read_rows"]

_SUFFIXES = (".txt", ".jsonl")
_NO_DATASETS = (
    "{!r} is neither a .txt nor a .jsonl file, so it is taken for the id of a data set, which needs the datasets "
    "package: pip install datasets"
)


def is_text_file(where: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a file of rows, and not of a data set.

    >>> is_text_file("data/prompts.jsonl"), is_text_file("user/data")
    (True, False)
    """
    return Path(where).suffix in _SUFFIXES


def check_rows(where: str | os.PathLike[str], error: type[MESwitchError]) -> None:
    """Find out whether :func:`read_rows` could begin, without reading.

    Args:
        where: as there.
        error: type to raise.

    Raises:
        MESwitchError: of type ``error``: a file that cannot be opened or is of another kind; a data set, where the
            ``datasets`` package is not installed.
    """
    path = Path(where)
    if is_text_file(path):
        try:
            path.open("rb").close()
        except OSError as cause:
            raise error(f"The file {path} cannot be read: {cause}") from cause
    elif path.exists():
        raise error(f"{path} is neither a .txt nor a .jsonl file. Give one of these, or the id of a data set.")
    elif "datasets" not in sys.modules and importlib.util.find_spec("datasets") is None:
        raise error(_NO_DATASETS.format(os.fspath(where)))


def read_rows(where: str | os.PathLike[str], error: type[MESwitchError]) -> Iterator[tuple[Any, str]]:
    """Rows one after the other, and what to call each in a message.

    Lines end with line feeds, with or without a carriage return. The other characters at which ``str.splitlines``
    cuts, U+2028 among them, may stand inside a JSON text as they are (RFC 8259, section 7).

    Args:
        where: a ``.txt`` file, whose lines are rows' ``text``; a ``.jsonl`` file, with a JSON value a line; or the id
            of a data set, of which the ``train`` split is streamed (needs the ``datasets`` package). Files are UTF-8,
            with or without a byte order mark; lines of nothing but white space are passed over.
        error: type to raise.

    Yields:
        ``{"text": line}``, what the JSON holds, or a data set's row; and where, as ``"Line 3 of prompts.jsonl"``.

    Raises:
        MESwitchError: of type ``error``: as :func:`check_rows`; a file that is not UTF-8, a line that is not JSON, a
            data set that cannot be loaded.
    """
    check_rows(where, error)
    if is_text_file(where):
        yield from _file_rows(Path(where), error)
        return
    name = os.fspath(where)
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]

        rows = load_dataset(name, split="train", streaming=True)
    except ImportError as cause:
        raise error(_NO_DATASETS.format(name)) from cause
    except (OSError, ValueError) as cause:
        raise error(
            f"The data set {name!r} cannot be loaded: {cause} Give the id of one with a train split, or a .txt or "
            ".jsonl file."
        ) from cause
    for row in rows:
        yield row, f"A row of {name}"


def _file_rows(path: Path, error: type[MESwitchError]) -> Iterator[tuple[Any, str]]:
    for number, line in _lines(path, error):
        place = f"Line {number} of {path}"
        if path.suffix == ".txt":
            yield {"text": line}, place
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as cause:
            raise error(f"{place} is not JSON: {cause}") from cause
        yield value, place


def _lines(path: Path, error: type[MESwitchError]) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"The file {path} cannot be read: {cause}") from cause
