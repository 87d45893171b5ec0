"""One writer at a time in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import OutputFolderError

try:
    import fcntl
except ImportError:  # Windows, which cannot lock a folder itself
    fcntl = None  # type: ignore[assignment]

__all__ = ["PARTIAL_SUFFIX", "FolderLock"]

#: Ends the (hidden) names of files that are not complete yet. Who holds a folder's lock may remove all of them.
PARTIAL_SUFFIX = ".meswitch-partial"

_LOCK_NAME = ".meswitch-lock"


class FolderLock:
    """A folder's lock, held from construction to :meth:`release`; the system takes it back if the process dies.

    Args:
        folder: an existing folder.

    Attributes:
        held: whether it could be had. Some network file systems know no locks.

    Raises:
        OutputFolderError: somebody else holds it, in this process or another.
    """

    def __init__(self, folder: Path) -> None:
        self.held = True
        self._file: FileLock | None = None
        self._descriptor: int | None = None
        try:
            if fcntl is None:
                self._file = FileLock(folder / _LOCK_NAME)
                self._file.acquire(timeout=0)
            else:
                self._descriptor = os.open(folder, os.O_RDONLY)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, Timeout) as cause:
            self.release()
            raise OutputFolderError(
                f"Somebody else is saving into {folder} at this moment. Wait until that is done, or give "
                "another folder."
            ) from cause
        except (OSError, NotImplementedError):
            self.release()
            self.held = False

    def release(self) -> None:
        """Let others write. Does nothing if the lock is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._file is not None:
            self._file.release()
