"""One compression in this process: its seconds, by phase, and its peaks, as JSON on standard output.

    python -m benchmarks.compress.one_run BASE EXPERT OUTPUT BITS SALIENT DEVICE CALIBRATION TOKENS PARENT

``CALIBRATION`` may be empty; ``PARENT`` is the id of the process that starts this one, which ends with it. Phases are
what the main thread does or waits for; what other threads do meanwhile is not counted.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transformers_meswitch import MESwitchConfig, compress
from transformers_meswitch.compression import driver, recipe
from transformers_meswitch.compression.read_ahead import ReadAhead
from transformers_meswitch.compression.sequential import SequentialStatistics

#: Phase to the function that it is spent in and its owner.
_PHASES: dict[str, tuple[Any, str]] = {
    "calibrating": (SequentialStatistics, "get"),
    "waiting for reads": (ReadAhead, "of"),
    "fitting": (driver, "compress_module"),
    "writing the repo": (recipe, "write_delta"),
}


def peak_bytes() -> int:
    """The most that this process had resident so far."""
    status = Path("/proc/self/status")
    if status.exists():  # where there is one, since the system's count begins with that of the process's parent
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def end_with(parent: int) -> None:
    """Have this process end within a second of its parent, even of one that was killed: an orphan would hold a GPU."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def timed(function: Callable[..., Any], phase: str, seconds: dict[str, float], device: str) -> Callable[..., Any]:
    """The function, adding what each call takes, device work included, to ``seconds[phase]``."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[phase] += time.perf_counter() - start

    return run


def main(
    base: str, expert: str, output: str, bits: str, salient: str, device: str, calibration: str, tokens: str
) -> None:
    """Compress and print."""
    phases = dict.fromkeys(_PHASES, 0.0)
    for phase, (owner, name) in _PHASES.items():
        setattr(owner, name, timed(getattr(owner, name), phase, phases, device))
    torch.zeros(1, device=device)  # what a device costs to begin with belongs to the start
    before = peak_bytes()
    start = time.perf_counter()
    compress(
        base,
        expert,
        output,
        MESwitchConfig(bits=int(bits), salient_channels=int(salient)),
        calibration or None,
        device=device,
        max_calibration_tokens=int(tokens),
        local_files_only=True,
    )
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "phases": phases | {"rest": seconds - sum(phases.values())}}
    found |= {"start_bytes": before, "peak_bytes": peak_bytes()}
    if device == "cuda":
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found))


if __name__ == "__main__":
    *arguments, parent = sys.argv[1:]
    end_with(int(parent))
    main(*arguments)
