"""How much of the memory that a process may use is free: the machine's, or less where a container has a limit."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

__all__ = ["free_share"]

_CGROUP = Path("/sys/fs/cgroup")
#: Files of a control group, version 2 and then 1: its limit, its use, statistics, and what those call a cache of files
#: that the kernel gives up when it is asked for memory.
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_share(cgroup: Path = _CGROUP) -> float:
    """The share that is free, of the machine's memory or of a container's, whichever is the smaller.

    Args:
        cgroup: where the process's control group is mounted; without one, as on other systems than Linux, there is
            no limit.
    """
    memory = psutil.virtual_memory()
    share: float = memory.available / memory.total
    for files in _FILES:
        own = _free_of_limit(cgroup, *files)
        if own is not None:
            share = min(share, own)
    return share


def _free_of_limit(cgroup: Path, limit: str, use: str, statistics: str, cache: str) -> float | None:
    """The free share of a limit, or `None` without one."""
    try:
        most = int((cgroup / limit).read_text())
        used = int((cgroup / use).read_text())
        kept = dict(line.split() for line in (cgroup / statistics).read_text().splitlines())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    used -= int(kept.get(cache, 0))
    return max(0.0, 1 - used / most) if most > 0 else 0.0
