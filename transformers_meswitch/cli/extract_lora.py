"""``meswitch extract-lora``: what of a delta fits into a LoRA."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from .device import usable_device
from .exported import add_export_arguments, export_arguments

if TYPE_CHECKING:
    from ..export.lora import ExtractedLora

_EXAMPLE = """examples:
  meswitch extract-lora ./math-delta -o math-lora --rank 64 --text held-out.jsonl
  meswitch extract-lora me/mistral-family:math -o math-lora --json
"""
_LEFT_OUT = {"rows": "rows of embedding and output head", "values": "norms", "biases": "biases"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "extract-lora",
        help="approximate a delta by a LoRA, and measure what that loses",
        description="Write the best approximation of a rank of the delta's linear layers as a PEFT LoRA, for engines "
        "that take nothing else. A full fine-tune is not of low rank: look at what is lost. Nothing is lost by "
        "meswitch merge.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_export_arguments(parser)
    parser.add_argument("--rank", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--text",
        metavar="FILE|DATASET",
        help="what the expert typically sees, to measure the loss on: a .txt or .jsonl file or the id of a data set; "
        "without it only weights are compared",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="tokens of it to run at most; default: %(default)s"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: %(default)s"
    )
    parser.add_argument("--device", help="torch device; default: an accelerator if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.rank < 1:
        args.parser.error(f"argument --rank: {args.rank} is below 1")
    if args.max_tokens < 2:
        args.parser.error(f"argument --max-tokens: {args.max_tokens} is below 2")
    device = usable_device(args)

    import torch

    from ..export.lora import extract_lora

    found = extract_lora(
        **export_arguments(args),
        rank=args.rank,
        texts=args.text,
        max_tokens=args.max_tokens,
        dtype=getattr(torch, args.dtype),
        device=device,
    )
    print(json.dumps(_as_json(found), indent=2) if args.json else _render(found))


def _as_json(found: ExtractedLora) -> dict[str, object]:
    return dataclasses.asdict(found) | {"directory": str(found.directory)}


def _render(found: ExtractedLora) -> str:
    worst = max(found.lost, key=found.lost.__getitem__)
    lines = [
        f"{found.directory}: rank {found.rank}, {found.total_bytes:,} bytes",
        f"lost of the linear layers' delta: {found.lost_overall:.1%}, at most {found.lost[worst]:.1%} ({worst})",
    ]
    lines += [
        f"left out: {_LEFT_OUT[kind]}, {count} module{'' if count == 1 else 's'}"
        for kind, count in found.left_out.items()
    ]
    if found.text is not None:
        text = found.text
        lines.append(
            f"KL from base + delta on {text.tokens:,} tokens, nats a token: {text.kl:.4g} with the LoRA, "
            f"{text.kl_base:.4g} without"
        )
        lines.append(
            f"same most probable next token: {text.top1_agreement:.1%} with the LoRA, {text.top1_agreement_base:.1%} "
            "without"
        )
    return "\n".join(lines)
