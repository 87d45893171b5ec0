"""Strikes at every step of a save: an exception, or the death of the process."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from transformers_meswitch.delta_format import reader, writer

#: Everything by which a save changes a folder.
CHANGES: tuple[tuple[Any, str], ...] = (
    (os, "replace"),
    (os, "fsync"),
    (shutil, "copyfile"),
    (Path, "unlink"),
    (Path, "write_bytes"),
    (writer, "write_tensors"),
)


@contextmanager
def before_each_change(strike: Callable[[int], None]) -> Iterator[None]:
    """Call ``strike(n)`` before the nth change, n from 1."""
    count = 0

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            strike(count)
            return original(*args, **kwargs)

        return wrapper

    patches = [mock.patch.object(owner, name, patched(getattr(owner, name))) for owner, name in CHANGES]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def die_at_each_change(new: str, folder: str) -> None:
    """Save the delta ``new`` into ``folder/1``, ``folder/2``, …, killed before the nth change in the nth folder.

    Prints how many of the saves were killed; the one after them ends well.
    """
    delta = reader.open_delta(new)
    tensors = {key: tensor.clone() for key, tensor in delta.tensors().items()}
    for at in range(1, 1000):
        child = os.fork()
        if child == 0:
            with before_each_change(lambda n, at=at: os._exit(9) if n == at else None):
                writer.write_delta(f"{folder}/{at}", delta.config, tensors, texts={"README.md": "new"})
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            print(at - 1)
            return


if __name__ == "__main__":
    die_at_each_change(*sys.argv[1:])
