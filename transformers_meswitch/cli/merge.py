"""``meswitch merge``: an expert as a plain checkpoint."""

from __future__ import annotations

import argparse
import json

from .exported import add_export_arguments, export_arguments

_EXAMPLE = """examples:
  meswitch merge ./math-delta -o math-merged
  meswitch merge me/mistral-family:math -o math-merged --max-shard-size 5GB
  meswitch merge me/math-delta --base ./mistral -o math-merged --dtype bfloat16 --json
"""
_DTYPES = ("bfloat16", "float16", "float32")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "merge",
        help="write an expert as a plain checkpoint that loads without this package",
        description="Write base + delta as a plain checkpoint: the weights that the merged model has, bit for bit, "
        "the expert's tokenizer, chat template and generation config, and a card. One module at a time is in memory.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_export_arguments(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="default: what each tensor has in the base's checkpoint")
    parser.add_argument(
        "--max-shard-size", default="50GB", metavar="SIZE", help="of a weight file at most; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from ..export.merged_checkpoint import merge_checkpoint

    merged = merge_checkpoint(
        **export_arguments(args),
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        max_shard_size=args.max_shard_size,
    )
    files = f"{len(merged.files)} file{'' if len(merged.files) == 1 else 's'}"
    if args.json:
        content = {"directory": str(merged.directory), "files": list(merged.files), "tensors": merged.tensors}
        print(
            json.dumps(
                {**content, "total_bytes": merged.total_bytes, "dtype": list(merged.dtype), "base": merged.base}
            )
        )
    else:
        print(
            f"{merged.directory}: {merged.tensors} tensors ({', '.join(merged.dtype)}) of {merged.base} and "
            f"{args.source}, {merged.total_bytes:,} bytes in {files}"
        )
