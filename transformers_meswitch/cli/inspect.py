"""``meswitch inspect``: what a delta holds, byte by byte."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..inspection import Inspection, ModuleRow

_EXAMPLE = """examples:
  meswitch inspect me/math-delta
  meswitch inspect ./math-delta --base me/base --expert me/math --json
  meswitch inspect ./math-delta --base me/base --expert me/math --plot math-delta.png
"""
_ABSENT = "—"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="table of a delta: bits, salient channels, bytes and error of each layer",
        description="Count a delta to the byte. The relative error ‖Δ − Δ̂‖ / ‖Δ‖ of what is quantised needs the "
        "checkpoints of base and expert. The ratio is against a full copy of the expert in bfloat16.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("delta", metavar="DELTA", help="delta repo: a Hub id or a folder")
    parser.add_argument("--revision", help="branch, tag or commit of the delta repo")
    parser.add_argument("--base", help="the base, where the delta's own cannot be reached, or for the relative error")
    parser.add_argument("--expert", help="checkpoint of the expert, for the relative error")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="also draw the range of each input channel of a layer, with --base and --expert the error of each layer, "
        "and the bytes by kind of module into FILE (.png, .svg, .pdf)",
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="linear layer whose channels to draw; default: the one in the middle of those with salient channels",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.expert is not None and args.base is None:
        args.parser.error("the relative error needs --base beside --expert")

    if args.layer is not None and args.plot is None:
        args.parser.error("argument --layer: it chooses what --plot draws")

    from tqdm import tqdm

    from ..inspection import as_json, inspect_delta

    if args.plot is not None:
        from ..plotting import require_matplotlib

        require_matplotlib()
        folder = Path(args.plot).parent
        if not folder.is_dir():
            args.parser.error(f"argument --plot: there is no folder {str(folder)!r}; make it, or choose another place")

    def bar(names: Iterable[str]) -> Iterable[str]:
        return tqdm(names, desc="Measuring", unit="layer", disable=None)

    inspection = inspect_delta(args.delta, revision=args.revision, base=args.base, expert=args.expert, progress=bar)
    if inspection.dense_bytes is None:
        print(
            f"The base {inspection.base} cannot be reached, so there is no full copy to compare with; give --base.",
            file=sys.stderr,
        )
    if args.plot is not None:
        _plot(args, inspection)
    print(json.dumps(as_json(inspection), indent=2) if args.json else _render(inspection))


def _plot(args: argparse.Namespace, inspection: Inspection) -> None:
    from ..channels import channel_ranges, default_layer
    from ..delta_format.reader import open_delta, resolve_delta
    from ..plotting import delta_figure

    layer = args.layer or default_layer(inspection)
    delta = open_delta(resolve_delta(args.delta, revision=args.revision))
    channels = None if layer is None else channel_ranges(delta, layer, args.base, args.expert)
    delta_figure(inspection, channels).savefig(args.plot)


def _render(inspection: Inspection) -> str:
    header = ("module", "kind", "shape", "bits", "salient", "bytes", "relative error")
    lines = [header, *map(_cells, inspection.modules)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    # Names and kinds read from the left, numbers from the right.
    align = (str.ljust, str.ljust, *[str.rjust] * (len(header) - 2))
    table = [
        "  ".join(put(cell, width) for put, cell, width in zip(align, line, widths, strict=True)) for line in lines
    ]
    table.insert(1, "  ".join("-" * width for width in widths))
    dense, ratio = inspection.dense_bytes, inspection.ratio
    totals = [
        ("tensors", f"{inspection.tensor_bytes:,}"),
        ("headers and configuration", f"{inspection.overhead_bytes:,}"),
        ("delta on disk", f"{inspection.total_bytes:,}"),
        ("full copy in bfloat16", _ABSENT if dense is None else f"{dense:,}"),
        ("ratio", _ABSENT if ratio is None else f"{ratio:.2f}x"),
    ]
    label, number = (max(len(total[i]) for total in totals) for i in range(2))
    base = f"base {inspection.base or _ABSENT}, format version {inspection.format_version}"
    summary = [f"{name.ljust(label)}  {value.rjust(number)}" for name, value in totals]
    return "\n".join([base, "", *table, "", *summary])


def _cells(row: ModuleRow) -> tuple[str, ...]:
    shape = " x ".join(map(str, row.shape)) or _ABSENT
    if row.stored_rows is not None:
        shape = f"{row.stored_rows} of {shape}"
    return (
        row.module,
        row.kind,
        shape,
        _ABSENT if row.bits is None else str(row.bits),
        _ABSENT if row.salient_channels is None else str(row.salient_channels),
        f"{row.bytes:,}",
        _ABSENT if row.relative_error is None else f"{row.relative_error:.4f}",
    )
