"""Prompts by expert, read from files or data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import RouterError
from ..text_rows import read_rows
from .conversation import is_chat
from .texts import Prompt

__all__ = ["distinct", "prompts_of", "read_prompts"]

#: Fields of a row that may hold its prompt, the first that is there.
_PROMPT = ("prompt", "text", "messages")


def read_prompts(sources: Sequence[str]) -> dict[str, list[Prompt]]:
    """Prompts of each expert, in the order in which they are found; each counts once for an expert.

    Args:
        sources: each ``EXPERT=WHERE``, prompts of one expert, or ``WHERE``, whose rows name theirs as ``expert``.
            ``WHERE`` is a ``.jsonl`` file, whose objects have ``prompt`` or ``text`` (a text) or ``messages`` (a
            conversation); a ``.txt`` file with a prompt a line, of one expert; or the id of a data set whose ``train``
            split has such rows (needs the ``datasets`` package).

    Raises:
        RouterError: a file, row or data set that cannot be read, ``datasets`` missing; the line is named.
    """
    found: dict[str, list[Prompt]] = {}
    for source in sources:
        expert, separator, where = source.partition("=")
        if not separator or os.path.exists(source):  # a path may have an equals sign
            expert, where = "", source
        for label, prompt in prompts_of(where, expert):
            found.setdefault(label, []).append(prompt)
    return {label: distinct(prompts) for label, prompts in found.items()}


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Each prompt once, in the order in which they come.

    >>> distinct(["a", "b", "a"])
    ['a', 'b']
    """
    return list({json.dumps(prompt, default=str): prompt for prompt in prompts}.values())


def prompts_of(where: str, expert: str = "") -> Iterator[tuple[str, Prompt]]:
    """The prompts of one file or data set, each with its expert.

    Args:
        where: see :func:`read_prompts`.
        expert: whose prompts they are; if empty, the rows say so.

    Raises:
        RouterError: as :func:`read_prompts`.
    """
    if not expert and Path(where).suffix == ".txt":
        raise RouterError(f"{where} does not say whose prompts it holds. Give it as EXPERT={where}.")
    for row, place in read_rows(where, RouterError):
        fields: dict[str, Any] = row if isinstance(row, dict) else {}
        # Data sets of several kinds of rows fill in what a row has not with null.
        prompt: Any = next((fields[name] for name in _PROMPT if fields.get(name) is not None), None)
        label = expert or fields.get("expert")
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise RouterError(
                f"{place} is {str(row)[:80]!r}, expected an object with 'prompt' or 'text', a text, or 'messages', a "
                "list of messages."
            )
        if not isinstance(label, str) or not label:
            raise RouterError(
                f"{place} names no expert: its 'expert' is {label!r}. Add it to each row, or give EXPERT={where}."
            )
        yield label, prompt
