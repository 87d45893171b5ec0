"""What a delta says of the text it was calibrated on: where it can be read again, and never the text itself."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from ..text_rows import is_text_file
from .calibration import DEFAULT, Calibration

__all__ = ["calibration_record", "file_digest"]


def calibration_record(calibration: Calibration | None, samples: int) -> dict[str, Any] | None:
    """The field ``calibration`` of ``adapter_config.json``.

    A file is named by its path below the folder that the program runs in, or by its name alone, so that nothing is
    told of this machine; its digest tells it from another of that name.

    Args:
        calibration: what was calibrated on.
        samples: how many of its samples were read, from the first.

    Returns:
        ``source``: ``"default"``, the path of a file, or the id of a data set; ``samples``; and of a file ``sha256``.
        `None` where there is nothing to read again: no text, texts of the caller, or a file that is gone.

    >>> calibration_record("user/data", 40), calibration_record(["A text."], 1)
    ({'source': 'user/data', 'samples': 40}, None)
    """
    if not isinstance(calibration, str | os.PathLike):
        return None
    if calibration == DEFAULT or not is_text_file(calibration):
        return {"source": os.fspath(calibration), "samples": samples}
    path = Path(calibration).resolve()
    below = path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name
    try:
        return {"source": below, "samples": samples, "sha256": file_digest(path)}
    except OSError:  # a pipe or a file that was there only once
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
