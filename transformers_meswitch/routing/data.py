"""Prompts by expert, read from files or data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError, RouterError
from .conversation import is_chat
from .texts import Prompt

__all__ = ["read_prompts"]


def read_prompts(sources: Sequence[str]) -> dict[str, list[Prompt]]:
    """Prompts of each expert, in the order in which they are found; each counts once for an expert.

    Args:
        sources: each ``EXPERT=WHERE``, prompts of one expert, or ``WHERE``, whose rows name theirs as ``expert``.
            ``WHERE`` is a ``.jsonl`` file, whose objects have ``prompt`` or ``text`` (a text) or ``messages`` (a
            conversation); a ``.txt`` file with a prompt a line, of one expert; or the id of a data set whose ``train``
            split has such rows (needs the ``datasets`` package).

    Raises:
        RouterError: a file or row that cannot be read; the line is named.
        MissingDependencyError: a data set, without the ``datasets`` package.
    """
    found: dict[str, dict[str, Prompt]] = {}
    for source in sources:
        expert, separator, where = source.partition("=")
        if not separator or os.path.exists(source):  # a path may have an equals sign
            expert, where = "", source
        for row, place in _rows(where, expert):
            label = expert or row.get("expert")
            prompt: Any = row.get("prompt", row.get("text", row.get("messages")))
            if not isinstance(label, str) or not label:
                raise RouterError(
                    f"{place} names no expert: its 'expert' is {label!r}. Add it to each row, or give EXPERT={where}."
                )
            if not isinstance(prompt, str) and not is_chat(prompt):
                raise RouterError(
                    f"{place} is {str(row)[:80]!r}, expected an object with 'prompt' or 'text', a text, or "
                    "'messages', a list of messages."
                )
            found.setdefault(label, {}).setdefault(json.dumps(prompt), prompt)
    return {label: list(prompts.values()) for label, prompts in found.items()}


def _rows(where: str, expert: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows, and where each was found."""
    path = Path(where)
    if path.suffix not in (".txt", ".jsonl"):
        if path.exists():
            raise RouterError(
                f"{where} is neither a .txt nor a .jsonl file. Give one of these, or the id of a data set."
            )
        yield from ((row, f"A row of {where}") for row in _dataset(where))
        return
    if path.suffix == ".txt" and not expert:
        raise RouterError(f"{where} does not say whose prompts it holds. Give it as EXPERT={where}.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RouterError(f"The file {where} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        place = f"{where}, line {number},"
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield {"prompt": line}, place
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RouterError(f"{place} is not JSON: {error}") from error
        yield row if isinstance(row, dict) else {}, place


def _dataset(name: str) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingDependencyError(
            f"{name!r} is neither a .txt nor a .jsonl file, so it is taken for the id of a data set, which needs the "
            "datasets package: pip install datasets"
        ) from error
    return load_dataset(name, split="train", streaming=True)  # type: ignore[no-any-return]
