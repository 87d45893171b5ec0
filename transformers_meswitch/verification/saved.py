"""Keeping evidence in the delta repo that it is of, and in the repo's card."""

from __future__ import annotations

import os
from pathlib import Path

from ..cards import write_delta_card
from ..delta_format.reader import Delta
from ..delta_format.spec import EVIDENCE_NAME
from ..errors import VerificationError
from ..inspection import inspect_delta
from .evidence import Evidence, write_evidence

__all__ = ["check_saveable", "save_evidence"]


def check_saveable(delta: str | os.PathLike[str]) -> None:
    """Refuse to keep evidence anywhere but in a folder, before anything is measured.

    Raises:
        VerificationError: the delta is on the Hub.
    """
    if not Path(delta).is_dir():
        raise VerificationError(
            f"Evidence can be saved into a folder, and {os.fspath(delta)!r} is none. Download the delta repo with "
            "`hf download`, verify it there with --save, and upload it again."
        )


def save_evidence(delta: Delta, evidence: Evidence, base: str) -> Path:
    """Write ``meswitch_evidence.json`` beside a delta, and the section on fidelity of its ``README.md``.

    Each file is written whole or not at all. What people wrote into the card stays.

    Args:
        delta: the opened delta, in a folder.
        evidence: of its tensors.
        base: folder of the base, for the size of the full copy that the card compares with.

    Returns:
        The folder.

    Raises:
        OSError: the disk is full or not writable.
    """
    folder = delta.files.directory
    write_evidence(folder, evidence)
    dense = inspect_delta(folder, base=base).dense_bytes
    assert dense is not None, f"the base's configuration was read before {EVIDENCE_NAME} was measured"
    write_delta_card(folder, delta.config, dense_bytes=dense)
    return folder
