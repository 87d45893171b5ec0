"""Time and peak memory of compressing a pair of checkpoints, with and without calibration.

    python -m benchmarks.compress --shape small
    python -m benchmarks.compress --shape mistral-7b --layers 2
    python -m benchmarks.compress --shape mistral-7b --device cuda

Random weights, stated in the result: for time and memory only, since accuracy needs real fine-tunes. Each compression
runs in a process of its own, whose peak memory is the operating system's count. A plain read of both checkpoints,
which no compression can beat, is timed beside it: what ``dd if=FILE of=/dev/null bs=16M`` does. The result goes to
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.compress.random_pair import SHAPES, shape_of, write_pair
from benchmarks.provenance import device_name, provenance, write_result

RESULTS = Path(__file__).parents[1] / "results"


def files_of(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def forget(paths: Iterable[Path]) -> bool:
    """Have the system drop the files from its cache, so that they are read from the disk; whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True


def plain_read(paths: Iterable[Path]) -> float:
    """Seconds to read files and do nothing with them, as ``dd of=/dev/null bs=16M`` does."""
    buffer = bytearray(1 << 24)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def run(base: Path, expert: Path, output: Path, args: argparse.Namespace, calibration: str) -> dict[str, Any]:
    """One row: seconds, bytes read a second, and peaks of one compression."""
    forget(files_of(base, expert))
    settings = (args.bits, args.salient_channels, args.device, calibration, args.tokens, os.getpid())
    command = [sys.executable, "-m", "benchmarks.compress.one_run", *map(str, (base, expert, output, *settings))]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in files_of(base, expert))
    return {
        "what": f"calibrated on {args.tokens:,} tokens" if calibration else "not calibrated",
        **found,
        "mb_per_second": size / 1e6 / found["seconds"],
        "delta_bytes": sum(path.stat().st_size for path in output.glob("adapter_*")),
    }


def measure(folder: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """One row a measurement, and the bytes of the two checkpoints."""
    base, expert = folder / "base", folder / "expert"
    write_pair(base, expert, shape_of(args.shape, args.layers), args.device)
    size = sum(path.stat().st_size for path in files_of(base, expert))
    what = "a plain read of both" if forget(files_of(base, expert)) else "a plain read of both, perhaps from the cache"
    seconds = plain_read(files_of(base, expert))
    rows = [{"what": what, "seconds": seconds, "mb_per_second": size / 1e6 / seconds}]
    rows.append(run(base, expert, folder / "plain", args, ""))
    text = folder / "text.jsonl"
    # A token a letter, and samples of just below a power of two of them: little of a batch is padding.
    line = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 6
    with text.open("w") as file:
        for i in range(1 + args.tokens // len(line)):
            file.write(json.dumps({"text": f"{i}: {line}"}) + "\n")
    if args.tokens:
        rows.append(run(base, expert, folder / "calibrated", args, str(text)))
    return rows, size


def render(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    phases = next(row["phases"] for row in rows if "phases" in row)
    titles = ["time, s", *(f"{phase}, s" for phase in phases), "of both checkpoints, MB/s"]
    titles += ["peak host memory, MB", "at start", "device, MB", "delta, MB"]
    lines = [f"| what | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row in rows:
        sizes = [
            f"{row[key] / 1e6:,.0f}" if key in row else ""
            for key in ("peak_bytes", "start_bytes", "device_peak_bytes", "delta_bytes")
        ]
        parts = [f"{row['phases'][phase]:.1f}" if "phases" in row else "" for phase in phases]
        cells = [row["what"], f"{row['seconds']:.1f}", *parts, f"{row['mb_per_second']:,.0f}", *sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--layers", type=int, help="default: the shape's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--salient-channels", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=65536, help="to calibrate on; 0 for no calibrated run")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go for the time; default: the system's")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/compress_<shape>_<device>.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows, size = measure(Path(folder), args)
    config = shape_of(args.shape, args.layers)
    result = {
        **provenance("benchmarks.compress", device_name(args.device)),
        "cpus": os.cpu_count(),
        "weights": "random: for time and memory only",
        "shape": {
            key: getattr(config, key)
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        },
        "checkpoint_bytes": size,
        "rows": rows,
    }
    output = args.output or RESULTS / f"compress_{args.shape}_{args.device}.json"
    write_result(output, result)
    print(render(rows))


if __name__ == "__main__":
    # Ended by ``timeout`` or a scheduler: as by Ctrl-C, so that the checkpoints and the measured process go, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
