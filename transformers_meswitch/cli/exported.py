"""The expert that a command exports, and where to: arguments of ``merge`` and ``extract-lora``."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_export_arguments", "export_arguments"]


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the expert, its base and the output folder."""
    parser.add_argument(
        "source", metavar="DELTA|FAMILY:EXPERT", help="a delta repo, or an expert of a family: Hub ids or folders"
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--base", help="the base: Hub id or folder; default: what the family or the delta names")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of the base")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the delta or family repo")
    parser.add_argument("--subfolder", metavar="DIR", help="folder inside the delta or family repo")


def export_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was given for them, as the functions of :mod:`transformers_meswitch.export` name it."""
    from ..export.inputs import split_expert

    source, expert = split_expert(args.source)
    named = {name: getattr(args, name) for name in ("base", "base_revision", "revision", "subfolder")}
    return {"source": source, "output_dir": args.output, "expert": expert, **named}
