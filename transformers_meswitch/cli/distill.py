"""``meswitch distill``: a delta whose step sizes are trained on its expert's logits."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from .device import usable_device

_EXAMPLE = """examples:
  meswitch distill me/base me/math ./math-delta -o math-distilled
  meswitch distill me/base me/math me/math-delta -o math-distilled --calibration prompts.jsonl --steps 400 --json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "distill",
        help="train a delta's step sizes until it answers as the expert it was made from",
        description="Train the step sizes and salient columns of a delta on the expert's logits. Codes stay as they "
        "are, and so does the size. A quarter of the text is held out: if training does not bring the delta nearer to "
        "the expert there, it is written as it was. One model is in memory at a time. The state of training is kept "
        "in DIR.partial: after an interruption, the same command goes on from there.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="the model that the expert was fine-tuned from: Hub id or folder")
    parser.add_argument("expert", metavar="EXPERT", help="the fine-tuned model: Hub id or folder")
    parser.add_argument("delta", metavar="DELTA", help="the delta repo: Hub id or folder")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the new delta repo")
    parser.add_argument(
        "--calibration",
        default="default",
        metavar="default|FILE|DATASET",
        help="what the expert typically sees, prompts and answers: a .txt or .jsonl file, the id of a data set, or "
        "'default' for the built-in set; default: %(default)s",
    )
    parser.add_argument(
        "--max-calibration-tokens",
        type=int,
        default=65536,
        metavar="N",
        help="how much of the text to take at most; default: %(default)s",
    )
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps to train; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="samples a step; default: %(default)s")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-2, metavar="X", help="of the first step; default: %(default)s"
    )
    parser.add_argument("--device", help="torch device to train on; default: an accelerator if there is one")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of the base")
    parser.add_argument("--expert-revision", metavar="REV", help="branch, tag or commit of the expert")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the delta repo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    for option in ("steps", "batch_size", "max_calibration_tokens"):
        if getattr(args, option) < 1:
            args.parser.error(f"argument --{option.replace('_', '-')}: {getattr(args, option)} is below 1")
    if not 0 < args.learning_rate < float("inf"):
        args.parser.error(f"argument --learning-rate: {args.learning_rate} is not a number above 0")
    device = usable_device(args)

    from ..distillation.recipe import DistillationSettings, distill_with_report

    started = time.perf_counter()
    report = distill_with_report(
        args.base,
        args.expert,
        args.delta,
        args.output,
        args.calibration,
        DistillationSettings(args.steps, args.batch_size, args.learning_rate, args.max_calibration_tokens),
        device=device,
        base_revision=args.base_revision,
        expert_revision=args.expert_revision,
        revision=args.revision,
    )
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "output": str(report.output),
        "steps": report.steps,
        "text": report.text,
        "held_out_tokens": report.held_out_tokens,
        "kl_before": report.kl_before,
        "kl_after": report.kl_after,
        "improved": report.improved,
        "seconds": round(seconds, 3),
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"KL from the expert on {report.held_out_tokens:,} held-out tokens, nats a token: {report.kl_before:.4g} "
        f"before, {report.kl_after:.4g} after {report.steps} step{'' if report.steps == 1 else 's'}"
    )
    if not report.improved:
        print(
            "Training did not bring the delta nearer to the expert; its steps are as they were. Try a lower "
            "--learning-rate, or more text of what the expert typically sees."
        )
    print(f"{report.output}: written in {seconds:.1f} s")
