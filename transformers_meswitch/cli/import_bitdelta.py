"""``meswitch import-bitdelta``: a delta repo from a diff that BitDelta made."""

from __future__ import annotations

import argparse
import time

from .written import print_written

_EXAMPLE = """examples:
  meswitch import-bitdelta meta-llama/Llama-2-7b-hf diff.pt -o vicuna-delta --expert lmsys/vicuna-7b-v1.5
  meswitch import-bitdelta ./base diff.pt -o delta --json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "import-bitdelta",
        help="make a delta repo of a diff that BitDelta made",
        description="Write a delta repo that computes, on its base, what BitDelta's load_diff makes of base and diff. "
        "The diff is read as tensors alone: a pickle that asks for anything else is refused. What is finished is kept "
        "in DIR.partial: after an interruption, the same command goes on from there.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="the model that the expert was fine-tuned from")
    parser.add_argument("diff", metavar="DIFF.pt", help="the file that BitDelta's save_diff wrote")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the delta repo")
    parser.add_argument(
        "--expert",
        metavar="REPO",
        help="the fine-tune that the diff was made from: its tokenizer, chat template and generation config go into "
        "the delta, and its config.json is checked against the base's; its weights are not read. Default: the base's",
    )
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of the base")
    parser.add_argument("--expert-revision", metavar="REV", help="branch, tag or commit of the expert")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the totals")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.expert_revision is not None and args.expert is None:
        args.parser.error("argument --expert-revision: there is no --expert that it could be of")

    from ..bitdelta.recipe import import_bitdelta

    started = time.perf_counter()
    directory = import_bitdelta(
        args.base,
        args.diff,
        args.output,
        expert=args.expert,
        base_revision=args.base_revision,
        expert_revision=args.expert_revision,
    )
    print_written(directory, time.perf_counter() - started, as_json=args.json)
