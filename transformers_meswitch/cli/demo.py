"""``meswitch demo``: the bundled family, offline, on a CPU."""

from __future__ import annotations

import argparse

_EXAMPLE = """example:
  meswitch demo
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "demo",
        help="run the bundled family of experts, offline, on a CPU",
        description="Ask the bundled family the same prompts: every expert, the base, and a mixed batch.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ..demo.runner import run_demo

    run_demo(json=args.json)
