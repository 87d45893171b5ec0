"""Running GPU tests of a file again in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["check_interpreted"]


def check_interpreted(file: str, *tests: Callable[..., Any]) -> None:
    """Run tests of a file in a process of their own on the CPU; all have to pass and none may be skipped.

    Args:
        file: the tests' ``__file__``.
        tests: functions in it.
    """
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(f"{file}::{test.__name__}" for test in tests),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout
