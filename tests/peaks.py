"""Peak memory of a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap


def peaks_of(script: str, *arguments: str) -> list[int]:
    """Run a script that prints, as a JSON list, what ``benchmarks.compress.one_run.peak_bytes`` said along its way."""
    # Freed blocks go back at once: what glibc's arenas hold on to differs by 20 MB from run to run.
    environ = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=os.getcwd(), env=environ)
    return json.loads(found.stdout)
