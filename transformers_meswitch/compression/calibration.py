"""Where calibration text comes from: the built-in set, a file, a data set, or the caller."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import CompressionError
from ..text_rows import is_text_file, read_rows
from .default_calibration import default_chats

__all__ = ["DEFAULT", "Calibration", "describe", "read_samples"]

#: ``"default"``; texts; a ``.txt`` or ``.jsonl`` file; or the id of a data set.
Calibration = str | os.PathLike[str] | Sequence[str]

#: Names the built-in set wherever a calibration set is named.
DEFAULT = "default"


def read_samples(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts of a calibration set, one after the other.

    Args:
        calibration: ``"default"``, the built-in set; texts; the path of a ``.txt`` file (one sample a line) or of a
            ``.jsonl`` file, whose objects have ``text``, or ``messages`` (a chat), or ``prompt`` and ``completion``;
            or the id of a data set whose ``train`` split has such rows (needs the ``datasets`` package).
        tokenizer: the expert's; its chat template renders ``messages``.

    Raises:
        CompressionError: a file or row that cannot be read, ``datasets`` missing.

    >>> list(read_samples(["One text.", "Another."], tokenizer=None))
    ['One text.', 'Another.']
    """
    if calibration == DEFAULT:
        yield from (_rendered(chat, tokenizer) for chat in default_chats())
        return
    if not isinstance(calibration, str | os.PathLike):
        for i, text in enumerate(calibration):
            if not isinstance(text, str):
                raise CompressionError(f"calibration[{i}] is {type(text).__name__}, expected a string.")
            yield text
        return
    yield from (_text(row, tokenizer, place) for row, place in read_rows(calibration, CompressionError))


def describe(calibration: Calibration) -> str:
    """What a calibration set is, in words that tell no path of this machine.

    >>> describe("default"), describe("data/prompts.jsonl"), describe(["a", "b"]), describe("user/data")
    ('the built-in set', 'prompts.jsonl', 'texts of the caller', 'user/data')
    """
    if calibration == DEFAULT:
        return "the built-in set"
    if not isinstance(calibration, str | os.PathLike):
        return "texts of the caller"
    return Path(calibration).name if is_text_file(calibration) else os.fspath(calibration)


def _rendered(chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat as the expert's template has it; a paragraph a turn where there is none."""
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    return "\n\n".join(turn["content"] for turn in chat)


def _text(row: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """One sample of a row of any of the three kinds."""
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if isinstance(prompt, list) and isinstance(completion, list):
            row = {"messages": prompt + completion}
        if isinstance(row.get("messages"), list):
            if not tokenizer.chat_template:
                raise CompressionError(
                    f"{where} is a chat, but the expert's tokenizer has no chat template. Give 'text', or save the "
                    "template with the expert."
                )
            return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    raise CompressionError(
        f'{where} is {str(row)[:80]!r}, expected an object with "text", "messages", or "prompt" and "completion".'
    )
