"""Prompts of each expert from what it was calibrated on, where its delta says how that can be read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..compression.calibration import DEFAULT, describe
from ..compression.calibration_record import file_digest
from ..compression.default_calibration import default_chats
from ..delta_format.location import is_plain_path
from ..errors import RouterError
from ..text_rows import is_text_file
from .data import distinct, prompts_of
from .texts import Prompt

__all__ = ["CalibrationSet", "calibration_sets"]


@dataclass(frozen=True)
class CalibrationSet:
    """What an expert was calibrated on.

    Attributes:
        source: ``"default"``, the path of a file, or the id of a data set.
        samples: how many of its rows were read, from the first.

    >>> found = CalibrationSet("default", 2)
    >>> str(found), len(found.prompts())
    ('the built-in set', 2)
    """

    source: str
    samples: int

    def __str__(self) -> str:
        return describe(self.source)

    def prompts(self) -> list[Prompt]:
        """What was asked in it: of chats and of prompts with completions, no answers; each prompt once.

        Raises:
            RouterError: a row or data set that cannot be read.
        """
        rows: Iterator[Prompt] = (
            iter(default_chats())
            if self.source == DEFAULT
            else (prompt for _, prompt in prompts_of(self.source, "an expert"))
        )
        return distinct(islice(rows, self.samples))


def calibration_sets(records: Mapping[str, Mapping[str, Any] | None], folder: Path) -> dict[str, CalibrationSet]:
    """The calibration set of each expert; nothing but the files' digests is read yet.

    Deltas come from anywhere, so a file is only looked for below ``folder``, and only taken if it is the very one.

    Args:
        records: expert to the field ``calibration`` of its ``adapter_config.json``, checked; `None` if it has none.
        folder: where files are looked for.

    Raises:
        RouterError: for an expert there is none that can be read, or none that tells it from another. Each expert is
            named, with what is known of it.

    >>> calibration_sets({"math": {"source": "me/math", "samples": 9}}, Path())
    {'math': CalibrationSet(source='me/math', samples=9)}
    """
    if not records:
        raise RouterError("There are no experts to train a router for. Load a family that has some.")
    found: dict[str, CalibrationSet | str] = {name: _found(record, folder) for name, record in records.items()}
    whose: dict[str, list[str]] = {}
    for name, record in records.items():
        if record is not None and isinstance(found[name], CalibrationSet):
            whose.setdefault(record.get("sha256") or record["source"], []).append(name)
    for names in whose.values():
        for name in names if len(names) > 1 else ():
            others = ", ".join(repr(other) for other in names if other != name)
            found[name] = f"calibrated on {found[name]}, as {others}, which does not tell them apart"
    usable = {name: one for name, one in found.items() if isinstance(one, CalibrationSet)}
    if len(usable) < len(records):
        lines = [
            f"  - {name!r}: {one if isinstance(one, str) else f'fine ({one.source})'}" for name, one in found.items()
        ]
        files = {name: one.source for name, one in usable.items() if one.source != DEFAULT}
        wanted = " ".join(f"--data {name}={files.get(name, 'WHERE')}" for name in records)
        raise RouterError(
            "A router cannot be trained on what the experts were calibrated on:\n"
            + "\n".join(lines)
            + f"\nGive prompts of each: {wanted}, or in Python HeadRouter.train(model, prompts)."
        )
    return usable


def _found(record: Mapping[str, Any] | None, folder: Path) -> CalibrationSet | str:
    """The set that a record names, or why it cannot be read."""
    if record is None:
        return (
            "its delta does not say what it was calibrated on; it was made without calibration, on texts given in "
            "Python, or by an earlier release"
        )
    source, samples = str(record["source"]), int(record["samples"])
    if source == DEFAULT:
        return CalibrationSet(source, samples)
    if not is_plain_path(source):
        return f"its delta names {source!r}, which is neither a file below {folder} nor the id of a data set"
    if not is_text_file(source):
        return CalibrationSet(source, samples)
    path = folder / source
    try:
        same = file_digest(path) == record.get("sha256")
    except OSError:
        return f"calibrated on {source}, which is not in {folder.resolve()}"
    if not same:
        return f"calibrated on {source}, but {path.resolve()} is another file, or was changed since"
    return CalibrationSet(str(path), samples)
