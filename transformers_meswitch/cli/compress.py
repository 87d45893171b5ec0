"""``meswitch compress``: a delta repo from two checkpoints."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..compression.calibration import DEFAULT
from ..compression.presets import BUDGETS, DEFAULT_PRESET, PRESETS
from .device import usable_device
from .written import print_written

if TYPE_CHECKING:
    from ..compression.spending import Allocation

_EXAMPLE = r"""examples:
  meswitch compress me/base me/math -o math-delta
  meswitch compress me/base me/math -o math-delta --preset smallest --calibration prompts.jsonl
  meswitch compress me/base me/math -o math-delta --target-size 1.2GB --calibration prompts.jsonl
  meswitch compress me/base ./math -o math-delta --bits 1 --column-steps --calibration prompts.jsonl \
      --layer-bits 'down_proj$=2' --layer-bits 'layers\.0\.=4'
"""
_BITS = (1, 2, 3, 4)
#: Options that win over the preset's values.
_SETTINGS = ("bits", "salient_channels", "column_steps", *BUDGETS)
_NONE = "none"


def _layer_bits(text: str) -> tuple[str, int]:
    # A regular expression may itself hold "=".
    pattern, separator, bits = text.rpartition("=")
    if not separator or not pattern or bits not in map(str, _BITS):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=BITS with bits of 1 to 4")
    return pattern, int(bits)


def _words(settings: Mapping[str, Any]) -> str:
    """What a preset gives, by the names of the options."""
    return ", ".join(
        f"--{key.replace('_', '-')}" if value is True else f"--{key.replace('_', '-')} {value}"
        for key, value in settings.items()
    )


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
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULT_PRESET,
        help="what holds where the options below say nothing else; default: %(default)s. "
        + " ".join(f"{name}: {_words(settings)}." for name, settings in PRESETS.items()),
    )
    parser.add_argument("--bits", type=int, choices=_BITS, help="bits a weight; default: the preset's")
    parser.add_argument(
        "--salient-channels",
        type=int,
        metavar="N",
        help="input channels a layer kept in bfloat16; default: the preset's",
    )
    parser.add_argument(
        "--embedding-bits",
        type=_embedding_bits,
        default=argparse.SUPPRESS,
        metavar="{1,2,3,4,none}",
        help="bits a weight in changed rows of embeddings and output head; none keeps them as they are; "
        "default: the preset's",
    )
    parser.add_argument(
        "--column-steps",
        action=argparse.BooleanOptionalAction,
        help="also fit a step size per input channel; default: the preset's",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--target-bits",
        type=float,
        metavar="BITS",
        help="a budget in the place of --bits: bits a weight of all linear layers together, spent on the layers where "
        "they buy most",
    )
    budget.add_argument(
        "--target-size", metavar="SIZE", help="the same for the bytes of the whole delta, such as 1.2GB or 800MiB"
    )
    budget.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="the smallest delta with at most this mean KL divergence from the expert, on calibration text that is "
        "kept apart for it",
    )
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
        default=DEFAULT,
        metavar="default|FILE|DATASET|none",
        help="text to choose salient channels and steps by the layers' output error: a .txt or .jsonl file, the id of "
        "a data set, or 'default' for the built-in set; 'none' goes by the weights' error; default: %(default)s",
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
    parser.add_argument(
        "--full",
        action="store_true",
        help="fingerprint every byte of the base, not samples, for `meswitch verify --full` to compare",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with the totals")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    budget = next((key for key in BUDGETS if getattr(args, key) is not None), None)
    if args.bits is not None and budget is not None:
        args.parser.error(
            f"argument --bits: --{budget.replace('_', '-')} is a budget, which takes its place; give one of them, and "
            "--layer-bits to pin layers to their bits"
        )
    if args.salient_channels is not None and args.salient_channels < 0:
        args.parser.error(f"argument --salient-channels: {args.salient_channels} is below 0")
    if args.max_calibration_tokens < 1:
        args.parser.error(f"argument --max-calibration-tokens: {args.max_calibration_tokens} is below 1")
    device = usable_device(args)

    from ..compression.recipe import compress
    from ..configuration import MESwitchConfig

    # `None` is a value of --embedding-bits, so the option is absent where it was not given.
    stated = {key: getattr(args, key, None) for key in _SETTINGS if getattr(args, key, None) is not None}
    stated |= {key: value for key, value in vars(args).items() if key == "embedding_bits"}
    config = MESwitchConfig.from_preset(
        args.preset, args.base, args.base_revision, layer_bits=dict(args.layer_bits), **stated
    )
    chosen: list[Allocation] = []
    started = time.perf_counter()
    directory = compress(
        args.base,
        args.expert,
        args.output,
        config,
        None if args.calibration == _NONE else args.calibration,
        expert_revision=args.expert_revision,
        device=device,
        max_calibration_tokens=args.max_calibration_tokens,
        on_allocation=chosen.append,
        full_fingerprint=args.full,
    )
    kl = {} if not chosen or chosen[0].kl is None else {"kl": chosen[0].kl}
    print_written(directory, time.perf_counter() - started, as_json=args.json, **kl)
