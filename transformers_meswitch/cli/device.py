"""The ``--device`` of commands that compute."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["usable_device"]


def usable_device(args: argparse.Namespace) -> torch.device:
    """The device that ``args.device`` names, else an accelerator if there is one, else the CPU.

    A device that is unknown or cannot be used here is wrong usage, and ends the program through ``args.parser``.
    """
    import torch

    from ..devices import best_device

    if args.device is None:
        return best_device()
    try:
        device = torch.device(args.device)
        # A device that torch can name may still be absent; where torch was built without it, that is an assertion.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        # CUDA's own errors go on for a paragraph.
        reason = str(error).strip().partition("\n")[0]
        args.parser.error(f"argument --device: {args.device!r} cannot be used here: {reason}")
    return device
