"""Running GPU tests of a file again in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

__all__ = ["BOTH_SPEEDS", "SLOW", "check_interpreted", "make_few_blocks", "slow_when_interpreted"]

_Test = TypeVar("_Test", bound=Callable[..., Any])
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Marks of a case that is too slow for every run in the interpreter, and quick on a GPU and by the reference.
SLOW = (pytest.mark.slow,) if _INTERPRETED else ()
#: Of a test that starts the interpreter where some cases have the marks above: each speed is a test of its own.
BOTH_SPEEDS = pytest.mark.parametrize(
    "slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "slow"]
)


def slow_when_interpreted(test: _Test) -> _Test:
    """Give a test the marks above."""
    return pytest.mark.slow(test) if _INTERPRETED else test


def check_interpreted(file: str, *tests: Callable[..., Any], slow: bool = False) -> None:
    """Run tests of a file in a process of their own on the CPU; all have to pass and none may be skipped.

    Args:
        file: the tests' ``__file__``.
        tests: functions in it.
        slow: run what is marked as slow, and nothing else.
    """
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--durations=10",
            "-p",
            "no:cacheprovider",
            "-m",
            "slow and not gpu" if slow else "not slow and not gpu",
            *(f"{file}::{test.__name__}" for test in tests),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout


def make_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger blocks in the interpreter, whose time goes by their number and hardly by their size."""
    if not _INTERPRETED:
        return
    configurations, adding, kernel = (
        importlib.import_module(f"meswitch_kernels.{name}")
        for name in ("configurations", "add_delta", "triton_add_delta")
    )
    sizes = configurations.Configuration(block_out=64, block_codes=512, block_in=128)
    monkeypatch.setattr(configurations, "_DEFAULT", sizes)
    few = functools.partial(kernel.add_delta_triton, sizes=kernel.AddSizes(block_rows=64, block_columns=128, tiles=1))
    monkeypatch.setattr(adding, "_add_with_triton", few)
