"""Results: one file a cell (expert × seed × method) while running, one JSON of all of them in the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CellStore", "ExpertId", "collect", "merge"]


@dataclass(frozen=True)
class ExpertId:
    """An expert: its task, how far it is trained, and the seed of its training and of its held-out items.

    >>> str(ExpertId("math", "light", 0)), ExpertId.parse("math-light", 0).label
    ('math-light-s0', 'math-light')
    """

    task: str
    strength: str
    seed: int

    @property
    def label(self) -> str:
        """Task and strength."""
        return f"{self.task}-{self.strength}"

    def __str__(self) -> str:
        return f"{self.label}-s{self.seed}"

    @classmethod
    def parse(cls, label: str, seed: int) -> ExpertId:
        """An expert by its label.

        Raises:
            ValueError: not a task and a strength.
        """
        task, _, strength = label.rpartition("-")
        if not task or not strength:
            raise ValueError(f"{label!r} is no expert; one is a task and a strength, such as math-light.")
        return cls(task, strength, seed)


class CellStore:
    """The cells of a work folder. Several processes may write different cells at once.

    Args:
        folder: where they are kept; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, expert: ExpertId, method: str) -> Path:
        return self._folder / f"{expert}.{method}.json"

    def has(self, expert: ExpertId, method: str, settings: dict[str, Any]) -> bool:
        """Whether the cell is there, made with the same settings."""
        path = self._path(expert, method)
        return path.exists() and json.loads(path.read_text(encoding="utf-8"))["settings"] == settings

    def write(self, expert: ExpertId, method: str, settings: dict[str, Any], values: dict[str, Any]) -> None:
        """Write a cell; it is there whole or not at all."""
        cell = {
            "expert": expert.label,
            "task": expert.task,
            "strength": expert.strength,
            "seed": expert.seed,
            "method": method,
            "settings": settings,
            **values,
        }
        path = self._path(expert, method)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(cell), encoding="utf-8")
        partial.replace(path)

    def cells(self) -> list[dict[str, Any]]:
        """All cells, ordered by their names."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._folder.glob("*.json"))]


def _key(cell: dict[str, Any]) -> tuple[str, int, str]:
    return cell["expert"], cell["seed"], cell["method"]


def collect(head: dict[str, Any], experts: dict[str, Any], cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One result: its provenance, how each expert was trained, and the cells in order."""
    return {**head, "experts": dict(sorted(experts.items())), "cells": sorted(cells, key=_key)}


def _without_time(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key != "seconds"}


def merge(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one. Of a cell that is in more than one, the last counts.

    The provenance is the last's, too; the tables in it (``versions``, ``methods``) keep what only others have, such as
    the version of bitsandbytes, which not every run needs.

    Raises:
        ValueError: a cell's expert was trained differently in two results, so their cells are not of one expert.
            Training again gives the same weights only by chance; ``digest`` tells.
    """
    merged: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    cells: dict[tuple[str, int, str], dict[str, Any]] = {}
    for result in results:
        for key, value in result.items():
            if key not in ("experts", "cells"):
                merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
        for name, training in result["experts"].items():
            if _without_time(experts.setdefault(name, training)) != _without_time(training):
                raise ValueError(
                    f"expert {name} was trained twice: {experts[name]} and {training}. "
                    "Its cells would be of two experts; keep the results of one."
                )
        cells |= {_key(cell): cell for cell in result["cells"]}
    return collect(merged, experts, cells.values())
