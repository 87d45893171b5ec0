"""The ``meswitch`` command: one file a subcommand.

Importing anything of the package imports transformers and PEFT, since that is where it registers; so ``--help`` takes
the seconds that they take. Subcommands import what only they need when they run.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from huggingface_hub.errors import HTTPError

from ..errors import MESwitchError
from . import (
    compress,
    demo,
    distill,
    extract_lora,
    family,
    generate,
    import_bitdelta,
    inspect,
    merge,
    push,
    route,
    verify,
)

__all__ = ["main"]

_COMMANDS = (
    compress,
    distill,
    inspect,
    verify,
    route,
    generate,
    push,
    family,
    merge,
    extract_lora,
    import_bitdelta,
    demo,
)
_FAILURE, _INTERRUPTED = 1, 130


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="meswitch", description="One base model, many fine-tunes as 1-4 bit deltas.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"meswitch {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser


def _allow_any_encoding() -> None:
    """Let a stream whose encoding lacks a character (pipes on Windows, ``LANG=C``) show ``?`` instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a ``meswitch`` command.

    Errors are printed to standard error as one ``error: …``; set ``MESWITCH_DEBUG=1`` for the traceback.

    Args:
        argv: arguments after the program's name; the default is those of the process.

    Returns:
        Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
    """
    _allow_any_encoding()
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except SystemExit as stop:  # argparse, after --help, --version or a usage error
        return stop.code if isinstance(stop.code, int) else _FAILURE
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED
    # The others are what transformers and the Hub raise on purpose; any other exception is a bug and shows itself.
    except (MESwitchError, ValueError, OSError, HTTPError) as error:
        if os.environ.get("MESWITCH_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return _FAILURE
    return 0
