"""The numbers by which kernels know experts: rows of their tables, the same in all layers of a model."""

from __future__ import annotations

from itertools import count

__all__ = ["ROOM", "Slots"]

#: Experts for which tables have room from the start.
ROOM = 64


class Slots:
    """A number for each loaded expert, the lowest that is free when it comes; kept as long as it stays.

    Attributes:
        changes: how often a number was given or taken back; what was worked out of them holds while this does.

    >>> slots = Slots()
    >>> slots.take("math"), slots.take("code"), slots.of(None)
    (0, 1, -1)
    >>> slots.free("math")
    >>> slots.take("json")
    0
    """

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self.changes = 0

    def take(self, expert: str) -> int:
        """Give an expert its number; one that has one keeps it."""
        if expert not in self._of:
            taken = set(self._of.values())
            self._of[expert] = next(slot for slot in count() if slot not in taken)
            self.changes += 1
        return self._of[expert]

    def free(self, expert: str) -> None:
        """Take an expert's number back, if it has one."""
        if self._of.pop(expert, None) is not None:
            self.changes += 1

    def of(self, expert: str | None) -> int:
        """An expert's number; -1 for the base, as in the kernels."""
        return -1 if expert is None else self._of[expert]
