"""Held-out and training items of each task, regenerable from a seed and kept as gzipped JSON lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .tasks import Item, Task

__all__ = ["SEEDS", "held_out", "load_split", "split", "write_split"]

#: Each seed of a benchmark has held-out items of its own.
SEEDS = 3
_DATA_SEED = 20_240_609


def split(task: Task, *, train: int, test: int, seed: int = _DATA_SEED) -> tuple[list[Item], list[Item]]:
    """``train`` and ``test`` items of a task, no prompt twice in either or both; the held-out ones are drawn first.

    Prompts are the same when they differ in case and white space only. Both parts come from the same generator: the
    held-out items have new numbers, names and combinations, not new kinds of problem.
    """
    seen: set[str] = set()
    items: list[Item] = []
    for item in task.generate(seed):
        key = " ".join(item.prompt.lower().split())
        if key not in seen:
            seen.add(key)
            items.append(item)
        if len(items) >= train + test:
            break
    return items[test:], items[:test]


def write_split(folder: Path, task: Task, *, train: int, test: int, seed: int = _DATA_SEED) -> None:
    """Write both parts of a task's split to ``folder``, the same bytes for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, items in zip(("train", "test"), split(task, train=train, test=test, seed=seed), strict=True):
        text = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        _path(folder, task, part).write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def load_split(folder: Path, task: Task, part: str) -> list[Item]:
    """Read a part, ``"train"`` or ``"test"``, that :func:`write_split` wrote."""
    text = gzip.decompress(_path(folder, task, part).read_bytes()).decode("utf-8")
    return [Item(**json.loads(line)) for line in text.splitlines()]


def missing(folder: Path, tasks: Iterable[Task]) -> list[Task]:
    """The tasks whose split ``folder`` does not hold."""
    return [task for task in tasks if not all(_path(folder, task, part).exists() for part in ("train", "test"))]


def held_out(items: list[Item], seed: int, count: int) -> list[Item]:
    """The held-out items of one seed: its own part of the test split, or the start of it.

    Raises:
        ValueError: the seed has fewer items.
    """
    share = len(items) // SEEDS
    if not 0 <= seed < SEEDS or count > share:
        raise ValueError(
            f"seed {seed} with {count} items was asked for; the data holds {SEEDS} seeds of {share} items each. "
            "Write more with `python -m benchmarks.quality data --test-items N`."
        )
    return items[seed * share :][:count]


def _path(folder: Path, task: Task, part: str) -> Path:
    return folder / f"{task.name}.{part}.jsonl.gz"
