"""``meswitch compress``: a delta repo from two checkpoints."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from .device import usable_device

_EXAMPLE = r"""examples:
  meswitch compress me/base me/math -o math-delta --bits 2
  meswitch compress me/base ./math -o math-delta --bits 1 --column-steps --calibration prompts.jsonl \
      --layer-bits 'down_proj$=2' --layer-bits 'layers\.0\.=4'
"""
_BITS = (1, 2, 3, 4)


def _layer_bits(text: str) -> tuple[str, int]:
    # A regular expression may itself hold "=".
    pattern, separator, bits = text.rpartition("=")
    if not separator or not pattern or bits not in map(str, _BITS):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=BITS with bits of 1 to 4")
    return pattern, int(bits)


def _embedding_bits(text: str) -> int | None:
    if text != "none" and text not in map(str, _BITS):
        raise argparse.ArgumentTypeError(f"{text!r} is neither bits of 1 to 4 nor none")
    return None if text == "none" else int(text)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "compress",
        help="compress a fine-tuned model into a delta against its base",
        description="Compress a full fine-tune into a delta repo, layer by layer. Base and expert are safetensors "
        "checkpoints: Hub ids or folders. What is finished is kept in DIR.partial: after an interruption, the same "
        "command goes on from there.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="the model that the expert was fine-tuned from")
    parser.add_argument("expert", metavar="EXPERT", help="the fine-tuned model")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the delta repo")
    parser.add_argument("--bits", type=int, choices=_BITS, default=2, help="bits a weight; default: %(default)s")
    parser.add_argument(
        "--salient-channels",
        type=int,
        default=16,
        metavar="N",
        help="input channels a layer kept in bfloat16; default: %(default)s",
    )
    parser.add_argument(
        "--embedding-bits",
        type=_embedding_bits,
        default=3,
        metavar="{1,2,3,4,none}",
        help="bits a weight in changed rows of embeddings and output head; none keeps them as they are; "
        "default: %(default)s",
    )
    parser.add_argument("--column-steps", action="store_true", help="also fit a step size per input channel")
    parser.add_argument(
        "--layer-bits",
        type=_layer_bits,
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help="bits of the modules whose name the regular expression finds; the first match wins; may be repeated",
    )
    parser.add_argument(
        "--calibration",
        metavar="default|FILE|DATASET",
        help="text to choose salient channels and steps by the layers' output error: a .txt or .jsonl file, the id of "
        "a data set, or 'default' for the built-in set; without it they go by the weights' error",
    )
    parser.add_argument(
        "--max-calibration-tokens",
        type=int,
        default=65536,
        metavar="N",
        help="how much of the calibration text to run at most; default: %(default)s",
    )
    parser.add_argument("--device", help="torch device to compute on; default: an accelerator if there is one")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of the base")
    parser.add_argument("--expert-revision", metavar="REV", help="branch, tag or commit of the expert")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the totals")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.salient_channels < 0:
        args.parser.error(f"argument --salient-channels: {args.salient_channels} is below 0")
    if args.max_calibration_tokens < 1:
        args.parser.error(f"argument --max-calibration-tokens: {args.max_calibration_tokens} is below 1")
    device = usable_device(args)

    from ..compression.recipe import compress
    from ..configuration import MESwitchConfig
    from ..inspection import inspect_delta

    config = MESwitchConfig(
        args.base,
        args.base_revision,
        bits=args.bits,
        salient_channels=args.salient_channels,
        column_steps=args.column_steps,
        layer_bits=dict(args.layer_bits),
        embedding_bits=args.embedding_bits,
    )
    started = time.perf_counter()
    directory = compress(
        args.base,
        args.expert,
        args.output,
        config,
        args.calibration,
        expert_revision=args.expert_revision,
        device=device,
        max_calibration_tokens=args.max_calibration_tokens,
    )
    seconds = time.perf_counter() - started
    inspection = inspect_delta(directory)
    result: dict[str, Any] = {
        "output": str(directory),
        "modules": len(inspection.modules),
        "total_bytes": inspection.total_bytes,
        "dense_bytes": inspection.dense_bytes,
        "ratio": inspection.ratio,
        "seconds": round(seconds, 3),
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    ratio = "" if inspection.ratio is None else f", 1/{inspection.ratio:.2f} of a full copy in bfloat16"
    print(f"{directory}: {inspection.total_bytes:,} bytes{ratio} ({seconds:.1f} s)")
