"""What a task is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One problem.

    Attributes:
        prompt: the user's turn, without chat markup.
        completion: an answer that the scorer accepts, to learn from.
        hidden: what the scorer needs beside the completion, JSON-ready; never shown to the model.
    """

    prompt: str
    completion: str
    hidden: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One domain.

    Attributes:
        name: first part of the names of its experts.
        generate: seed to endless items, which may repeat.
        score: (answer, item) to whether the answer is right.
        max_new_tokens: room for the longest completion and its end token.
    """

    name: str
    generate: Callable[[int], Iterator[Item]]
    score: Callable[[str, Item], bool]
    max_new_tokens: int
