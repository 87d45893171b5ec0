"""``meswitch verify``: how well a delta stands for its expert, measured."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..verification.evidence import Evidence

_EXAMPLE = """examples:
  meswitch verify me/base me/math ./math-delta --text held-out.jsonl --save
  meswitch verify me/base me/math me/math-delta --text held-out.jsonl --max-kl 0.01 --json
  meswitch verify me/base me/math me/math-delta
"""
_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "verify",
        help="measure how well a delta stands for the expert it was made from",
        description="Compare the delta with its expert: the error of each layer's weights and, on text, the KL "
        "divergence from the expert, the top-1 agreement with it, and the perplexities of base, expert and delta. "
        "One model is in memory at a time; the expert's logits wait in a temporary file of at most --max-tokens x "
        "vocabulary numbers.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="the model that the expert was fine-tuned from: Hub id or folder")
    parser.add_argument("expert", metavar="EXPERT", help="the fine-tuned model: Hub id or folder")
    parser.add_argument("delta", metavar="DELTA", help="the delta repo: Hub id or folder")
    parser.add_argument(
        "--text",
        metavar="FILE|DATASET",
        help="what the expert typically sees, best not what it was calibrated on: a .txt or .jsonl file or the id of "
        "a data set; without it only weights are compared",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="tokens of it to run at most; default: %(default)s"
    )
    parser.add_argument(
        "--max-kl", type=float, metavar="X", help="exit with 1 if KL(expert || delta) is above X nats a token"
    )
    parser.add_argument("--save", action="store_true", help="keep the evidence in DELTA, a folder, and in its card")
    parser.add_argument("--device", help="torch device; default: an accelerator if there is one")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="default: float32 on a CPU, elsewhere that of the base's checkpoint"
    )
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of the base")
    parser.add_argument("--expert-revision", metavar="REV", help="branch, tag or commit of the expert")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the delta repo")
    parser.add_argument(
        "--full", action="store_true", help="compare every byte of the base; the delta was compressed with --full"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.max_tokens < 2:
        args.parser.error(f"argument --max-tokens: {args.max_tokens} is below 2")
    if args.max_kl is not None and args.text is None:
        args.parser.error("argument --max-kl: the KL divergence needs --text")

    import torch

    from ..errors import VerificationError
    from ..verification.verify import verify

    try:
        device = torch.device(args.device) if args.device else None
    except RuntimeError as error:
        args.parser.error(f"argument --device: {error}")
    evidence = verify(
        args.base,
        args.expert,
        args.delta,
        args.text,
        max_tokens=args.max_tokens,
        device=device,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        base_revision=args.base_revision,
        expert_revision=args.expert_revision,
        revision=args.revision,
        save=args.save,
        full_fingerprint=args.full,
    )
    print(json.dumps(_as_json(evidence), indent=2) if args.json else _render(evidence))
    if args.max_kl is not None and evidence.text is not None and not evidence.text.kl <= args.max_kl:
        raise VerificationError(
            f"KL(expert || delta) is {evidence.text.kl:.4g} nats a token, above the {args.max_kl:g} allowed."
        )


def _as_json(evidence: Evidence) -> dict[str, Any]:
    from ..verification.evidence import dump_evidence

    return dump_evidence(evidence) | {"too_far": evidence.too_far, "judgement": evidence.judgement}


def _render(evidence: Evidence) -> str:
    weights, text = evidence.weights, evidence.text
    errors = weights.relative_errors
    width = max(map(len, errors), default=0)
    lines = [f"{name.ljust(width)}  {error:.4f}" for name, error in errors.items()]
    if lines:
        lines = [f"{'quantised layer'.ljust(width)}  relative error", f"{'-' * width}  {'-' * 14}", *lines]
        lines += [f"{'mean'.ljust(width)}  {weights.mean:.4f}", ""]
    if text is not None:
        perplexities = (text.perplexity_base, text.perplexity_delta, text.perplexity_expert)
        rows = [
            ("", "base", "base + delta", "expert"),
            ("KL from the expert, nats a token", f"{text.kl_base:.4g}", f"{text.kl:.4g}", "0"),
            ("top-1 agreement", f"{text.top1_agreement_base:.2%}", f"{text.top1_agreement:.2%}", "100%"),
            ("perplexity", *map("{:.4g}".format, perplexities)),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        for label, *numbers in rows:
            cells = [number.rjust(size) for number, size in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([label.ljust(widths[0]), *cells]))
        lines += ["", f"{text.tokens:,} tokens, {text.dtype} on {text.device}"]
        if text.shared_vocab_size < text.vocab_size:
            lines.append(
                f"the base knows {text.shared_vocab_size:,} of {text.vocab_size:,} tokens of the vocabulary and "
                f"{text.shared_tokens:,} tokens of the text; its column and all perplexities are over those"
            )
        lines.append("")
    return "\n".join([*lines, evidence.judgement])
