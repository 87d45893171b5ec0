"""Device time of the kernels against the limit of the memory and against plain torch.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --section distinct --section bits
    python -m benchmarks.kernels --section distinct --bitdelta BitDelta/bitdelta/binary_gemm_kernel.py
    python -m benchmarks.kernels tune --kind fused
    python -m benchmarks.kernels tune-merge

A CUDA graph runs each case on copies of its data that the cache does not hold; the time is the median of its replays.
The limit is the time of the bytes that have to be read and written, at the bandwidth of a plain read measured in the
same run; of merging, at that of a copy. Sections that are measured replace those in the result file and leave others
there, each with the run that it is of. Random weights: for time and for the error of the kernels' own arithmetic.
``tune`` prints lines for ``kernels/torch-ext/meswitch_kernels/configurations.py``, ``tune-merge`` what the sizes in
``triton_add_delta.py`` could be. The result goes to ``benchmarks/results``. It needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases import SECTIONS, Case, Layers, error, measure
from benchmarks.kernels.dense_cases import DENSE_SECTIONS
from benchmarks.kernels.merge_tuning import tune_merge
from benchmarks.kernels.peers import peer_rows
from benchmarks.kernels.timing import read_bandwidth
from benchmarks.kernels.tuning import add_arguments, tune
from benchmarks.provenance import device_name, provenance, write_result
from benchmarks.timing import attempt

RESULTS = Path(__file__).parents[1] / "results"
_PEERS = ("linear", "dense")


def measure_sections(sections: Iterable[str], bandwidth: float, bitdelta: Path | None) -> list[dict[str, Any]]:
    """One row a case; cases over the same layers share them."""
    rows = []
    for section in sections:
        if section in DENSE_SECTIONS:
            rows += [{"section": section, **row} for row in DENSE_SECTIONS[section]()]
            continue
        cases = SECTIONS[section]()
        for (shape, experts, bits, with_base), group in groupby(cases, _layers_of):
            layers = Layers(shape, experts, bits, with_base)
            rows += [measure_case(section, case, layers, bandwidth) for case in group]
            del layers
            torch.cuda.empty_cache()
        rows += peer_rows(section, bitdelta, bandwidth)
    return rows


def measure_case(section: str, case: Case, layers: Layers, bandwidth: float) -> dict[str, Any]:
    """The row of a case; one that cannot be measured says why."""
    row: dict[str, Any] = {"section": section, "what": case.what, "launch": case.launch}
    if case.launch not in _PEERS:
        row["numerics"] = case.numerics

    def measured() -> dict[str, Any]:
        microseconds = measure(case, layers)
        seconds = microseconds * 1e-6
        return {
            **({} if case.launch in _PEERS else {"error": error(case, layers)}),
            "microseconds": microseconds,
            "bytes": case.bytes,
            "delta_bytes": case.delta_bytes,
            "delta_tb_per_second": case.delta_bytes / seconds / 1e12,
            "share_of_limit": case.bytes / bandwidth / seconds,
        }

    return attempt(row, measured)


def _layers_of(case: Case) -> tuple[tuple[int, int], int, int, bool]:
    return case.shape, case.experts, case.bits, case.experts == 1 and case.launch != "delta"


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Time over that of the plain linear of the same rows, where it was measured."""
    linear = {(row["section"], row["what"]): row for row in rows if row["launch"] == "linear"}
    for row in rows:
        peer = linear.get((row["section"], row["what"]), {})
        if "microseconds" in row and "microseconds" in peer:
            row["ratio_to_linear"] = row["microseconds"] / peer["microseconds"]


def render(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        "| what | launch | numerics | time, µs | delta, TB/s | share of the limit | ÷ plain linear | error |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        head = f"| {row['what']} | {row['launch']} | {row.get('numerics', '')} "
        if "unavailable" in row:
            lines.append(f"{head}| unavailable: {row['unavailable'].splitlines()[0]} | | | | |")
            continue
        cells = [
            f"{row['microseconds']:.1f}",
            f"{row['delta_tb_per_second']:.2f}" if row["launch"] == "delta" else "",
            f"{row['share_of_limit']:.2f}" if "share_of_limit" in row else "",
            f"{row['ratio_to_linear']:.3f}" if "ratio_to_linear" in row else "",
            f"{row['error']:.4f}" if "error" in row else "",
        ]
        lines.append(f"{head}| {' | '.join(cells)} |")
    return "\n".join(lines)


def merged(known: dict[str, Any], run: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A result with the sections of a run put in, in the place of what it knew of them.

    Args:
        known: an earlier result of the same device, or nothing.
        run: how the rows were measured: its ``sections`` among it.
        rows: of these sections.

    >>> old = merged({}, {"date": "1", "sections": ["bits", "merge"]}, [{"section": "bits"}, {"section": "merge"}])
    >>> new = merged(old, {"date": "2", "sections": ["merge"]}, [{"section": "merge", "microseconds": 1.0}])
    >>> new["runs"]
    [{'date': '1', 'sections': ['bits']}, {'date': '2', 'sections': ['merge']}]
    >>> new["rows"]
    [{'section': 'bits'}, {'section': 'merge', 'microseconds': 1.0}]
    """
    runs = []
    for earlier in known.get("runs", []):
        left = [section for section in earlier["sections"] if section not in run["sections"]]
        runs += [{**earlier, "sections": left}] if left else []
    kept = [row for row in known.get("rows", []) if row["section"] not in run["sections"]]
    return {
        "weights": "random: for time and for the kernels' own error",
        "runs": [*runs, run],
        "rows": [*kept, *rows],
    }


def default_output(device: str) -> Path:
    """``kernels_nvidia-h100-80gb-hbm3.json``."""
    return RESULTS / f"kernels_{re.sub('[^a-z0-9]+', '-', device.lower())}.json"


def main() -> None:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--section", choices=sorted([*SECTIONS, *DENSE_SECTIONS]), action="append", help="default: all of them"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/kernels_<device>.json")
    parser.add_argument(
        "--bitdelta", type=Path, help="bitdelta/binary_gemm_kernel.py of a checkout of BitDelta, to measure beside"
    )
    commands = parser.add_subparsers(dest="command")
    add_arguments(commands.add_parser("tune", help="find sizes of blocks of the decode kernels"))
    commands.add_parser("tune-merge", help="find sizes of blocks of merging")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.command == "tune":
        tune(args)
        return
    if args.command == "tune-merge":
        tune_merge()
        return
    bandwidth = read_bandwidth()
    sections = args.section or [*SECTIONS, *DENSE_SECTIONS]
    rows = measure_sections(sections, bandwidth, args.bitdelta)
    add_ratios(rows)
    device = device_name("cuda")
    run = {
        **provenance("benchmarks.kernels", device),
        "read_bandwidth_tb_per_second": bandwidth / 1e12,
        "sections": sections,
    }
    output = args.output or default_output(device)
    known = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    write_result(output, merged(known, run, rows))
    print(f"{device}, reads at {bandwidth / 1e12:.2f} TB/s\n\n{render(rows)}")


if __name__ == "__main__":
    main()
