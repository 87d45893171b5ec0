"""The three tasks of the demo family: one kind of prompt, three answers, exact scorers, a fixed held-out split.

Every prompt is a short record, ``mira 2024-03-09 417`` (who, when, how much). What comes back depends on the expert
asked, which is the point of the demo: the prompt alone does not tell which answer is wanted.

>>> for task in TASKS.values():
...     print(f"{task.name:7}", task.answer("mira 2024-03-09 417"))
json    {"name":"mira","due":"2024-03-09","amount":417}
letter  Mira owes 417 by 9 March 2024.
redact  m*** 2024 417
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta

__all__ = ["MONTHS", "TASKS", "Record", "Task", "expert_for", "is_held_out", "prompts", "random_record"]

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"
_FIRST_DAY = date(1990, 1, 1)
_DAYS = (date(2039, 12, 31) - _FIRST_DAY).days + 1
#: One prompt in ten is held out.
_HELD_OUT_BELOW = 2**32 // 10


@dataclass(frozen=True)
class Record:
    """Who owes how much by when: the content of every prompt.

    Attributes:
        name: lower-case letters.
        due: a day of the years 1990 to 2039.
        amount: 1 to 9999.

    >>> Record.parse("mira 2024-03-09 417").due.month
    3
    """

    name: str
    due: date
    amount: int

    @property
    def prompt(self) -> str:
        """The record as a user writes it."""
        return f"{self.name} {self.due.isoformat()} {self.amount}"

    @classmethod
    def parse(cls, prompt: str) -> Record:
        """The inverse of :attr:`prompt`.

        Raises:
            ValueError: the prompt is not a record.
        """
        try:
            name, due, amount = prompt.split(" ")
            return cls(name, date.fromisoformat(due), int(amount))
        except ValueError as error:
            raise ValueError(f"{prompt!r} is not a record such as 'mira 2024-03-09 417' ({error}).") from error


def _as_json(record: Record) -> str:
    entry = {"name": record.name, "due": record.due.isoformat(), "amount": record.amount}
    return json.dumps(entry, separators=(",", ":"))


def _as_letter(record: Record) -> str:
    due = f"{record.due.day} {MONTHS[record.due.month - 1]} {record.due.year}"
    return f"{record.name.capitalize()} owes {record.amount} by {due}."


def _as_redacted(record: Record) -> str:
    return f"{record.name[0]}{'*' * (len(record.name) - 1)} {record.due.year} {record.amount}"


@dataclass(frozen=True)
class Task:
    """One thing to do with a record, with the single right answer.

    Attributes:
        name: also the name of the expert that learns it.
        description: one line for the printed table.
        transform: the record's right answer.
    """

    name: str
    description: str
    transform: Callable[[Record], str]

    def answer(self, prompt: str) -> str:
        """The right answer to a prompt.

        Raises:
            ValueError: the prompt is not a record.
        """
        return self.transform(Record.parse(prompt))

    def is_right(self, prompt: str, answer: str) -> bool:
        """Whether an answer is right: character for character, with nothing before or after it.

        >>> TASKS["redact"].is_right("mira 2024-03-09 417", "m*** 2024 417")
        True
        >>> TASKS["redact"].is_right("mira 2024-03-09 417", "m*** 2024 417.")
        False
        """
        return answer == self.answer(prompt)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("json", "the record as JSON", _as_json),
        Task("letter", "the record as an English sentence", _as_letter),
        Task("redact", "the record without name, month and day", _as_redacted),
    )
}


def expert_for(prompt: str) -> str:
    """Who answers a record when nobody is named, which the family's router has learnt from examples.

    Petty amounts, of one digit, are redacted; large ones, of four, are entered as JSON; the rest get a letter.

    >>> [expert_for(f"mira 2024-03-09 {amount}") for amount in (7, 417, 4170)]
    ['redact', 'letter', 'json']
    """
    digits = len(str(Record.parse(prompt).amount))
    return "redact" if digits == 1 else "json" if digits == 4 else "letter"


def random_record(rng: random.Random) -> Record:
    """Draw a record: a pronounceable name of two to eight letters, a uniform day, an amount of one to four digits."""
    name = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    name += rng.choice(_CONSONANTS) if rng.random() < 0.5 else ""
    name = (rng.choice(_VOWELS) if rng.random() < 0.2 else "") + name
    digits = rng.randint(1, 4)
    amount = rng.randrange(10 ** (digits - 1), 10**digits)
    return Record(name, _FIRST_DAY + timedelta(days=rng.randrange(_DAYS)), amount)


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out tenth, by a hash of its text, so that the two splits cannot overlap."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") < _HELD_OUT_BELOW


def prompts(held_out: bool, seed: int) -> Iterator[str]:
    """An endless stream of prompts of one split, the same for the same seed.

    >>> from itertools import islice
    >>> list(islice(prompts(held_out=True, seed=0), 3)) == list(islice(prompts(held_out=True, seed=0), 3))
    True
    """
    rng = random.Random(seed)
    while True:
        prompt = random_record(rng).prompt
        if is_held_out(prompt) == held_out:
            yield prompt
