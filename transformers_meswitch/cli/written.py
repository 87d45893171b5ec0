"""What a command that wrote a delta says of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..delta_format.spec import LinearRecord, ModuleRecord

__all__ = ["print_written"]


def print_written(directory: Path, seconds: float, *, as_json: bool, **more: Any) -> None:
    """Print the totals of a delta repo.

    Args:
        directory: the repo.
        seconds: how long it took to make.
        as_json: one JSON object instead of a line of text.
        **more: further entries of that object.
    """
    from ..delta_format.reader import open_delta
    from ..inspection import inspect_delta

    inspection = inspect_delta(directory)
    if as_json:
        result = {
            "output": str(directory),
            "modules": len(inspection.modules),
            "total_bytes": inspection.total_bytes,
            "dense_bytes": inspection.dense_bytes,
            "ratio": inspection.ratio,
            "bits_per_weight": inspection.bits_per_weight,
            "candidates": _candidates(open_delta(directory).records.values()),
            "seconds": round(seconds, 3),
        }
        print(json.dumps(result | more, indent=2))
        return
    ratio = "" if inspection.ratio is None else f", 1/{inspection.ratio:.2f} of a full copy in bfloat16"
    print(f"{directory}: {inspection.total_bytes:,} bytes{ratio} ({seconds:.1f} s)")


def _candidates(records: Iterable[ModuleRecord]) -> list[dict[str, Any]]:
    """How many linear layers are stored how."""
    counts = Counter(
        (record.bits, record.salient_channels, record.column_step)
        for record in records
        if isinstance(record, LinearRecord)
    )
    return [
        {"bits": bits, "salient_channels": salient, "column_steps": column_steps, "modules": count}
        for (bits, salient, column_steps), count in sorted(counts.items())
    ]
