"""``meswitch route``: train a family's router, measure it, and see what it makes of a prompt."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plain_table import plain_table
from .device import usable_device

if TYPE_CHECKING:
    from ..routing.evaluation import Evaluation
    from ..routing.head_fit import LayerScore
    from ..routing.output import RouterOutput
    from ..routing.texts import Prompt

_EXAMPLE = """examples:
  meswitch route train ./family
  meswitch route train ./family --data prompts.jsonl
  meswitch route train ./family --data math=math.txt --data code=code.jsonl --data base=chat.txt
  meswitch route eval ./family --data held-out.jsonl --plot router.png
  meswitch route explain ./family "What is 17 times 23?"
  meswitch route try ./family
"""
#: Prompts between two updates of the progress bar.
_AT_ONCE = 64
_DATA = (
    "a .jsonl file or the id of a data set whose rows have 'expert' and 'prompt' (or 'text', or 'messages'); or "
    "EXPERT=WHERE, prompts of one expert, where a .txt file with a prompt a line will do too; 'base' is the base; may "
    "be repeated"
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its own subcommands."""
    parser = subparsers.add_parser(
        "route",
        help="train or measure the router that picks an expert for each prompt",
        description="Train a family's router, measure it, and see what it makes of a prompt.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    train = _action(actions, "train", "fit a router to prompts of each expert", _train)
    train.add_argument(
        "--data",
        action="append",
        metavar="[EXPERT=]WHERE",
        help=f"{_DATA}; default: what each expert was calibrated on, if its delta names a set of its own",
    )
    train.add_argument("-o", "--output", metavar="DIR", help="folder for the router; default: into FAMILY, a folder")
    train.add_argument("--layer", type=int, metavar="N", help="read the base after N layers; default: by validation")
    train.add_argument(
        "--window", type=int, default=256, metavar="N", help="tokens of a prompt to read at most; default: %(default)s"
    )
    train.add_argument(
        "--threshold", type=float, metavar="P", help="abstain where no expert is as likely; default: by validation"
    )
    train.add_argument("--default-expert", metavar="NAME", help="who answers where it abstains; default: the base")
    measure = _action(actions, "eval", "measure a router on prompts whose expert is known", _evaluate)
    measure.add_argument("--data", action="append", required=True, metavar="[EXPERT=]WHERE", help=_DATA)
    measure.add_argument(
        "--plot", metavar="FILE", help="draw confusion matrix and calibration curve: .png, .svg, .pdf"
    )
    explain = _action(actions, "explain", "show what a router makes of a prompt", _explain)
    explain.add_argument("prompt", metavar="PROMPT")
    _action(actions, "try", "route one line of standard input after the other", _try)
    for action in (measure, explain):
        _add_router(action)
    _add_router(actions.choices["try"])


def _action(actions: Any, name: str, purpose: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
    parser.add_argument("family", metavar="FAMILY", help="folder or Hub id")
    parser.add_argument("--device", help="torch device; default: an accelerator if there is one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_router(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--router", metavar="REPO", help="folder or Hub id of a router; default: the family's own")


def _load(args: argparse.Namespace, router: Any = None) -> Any:
    from .. import MESwitchModelForCausalLM

    device = usable_device(args)
    return MESwitchModelForCausalLM.from_pretrained(args.family, router=router, dtype="auto").to(device).eval()


def _train(args: argparse.Namespace) -> None:
    from ..errors import OutputFolderError
    from ..routing.calibration_sets import calibration_sets
    from ..routing.data import read_prompts
    from ..routing.head import HeadRouter
    from ..saving import put_router

    if args.output is None and not Path(args.family).is_dir():
        raise OutputFolderError(f"{args.family} is no folder, so the router cannot be put there. Give --output DIR.")
    prompts = None if args.data is None else read_prompts(args.data)
    model = _load(args, router=False)  # one that is damaged is to be replaced
    sources: dict[str, str] = {}
    if prompts is None:
        records = {name: model.peft_config[name].calibration for name in model.experts}
        sets = calibration_sets(records, Path())
        sources = {name: str(one) for name, one in sets.items()}
        prompts = {name: one.prompts() for name, one in sets.items()}
    scores: list[tuple[LayerScore, ...]] = []
    started = time.perf_counter()
    router = HeadRouter.train(
        model,
        prompts,
        layers=None if args.layer is None else [args.layer],
        window=args.window,
        threshold=args.threshold,
        default_expert=args.default_expert,
        progress=sys.stderr.isatty(),
        on_layers=scores.append,
    )
    seconds = time.perf_counter() - started
    if args.output is None or Path(args.output).resolve() == Path(args.family).resolve():
        put_router(router, args.family)
    else:
        router.save_pretrained(args.output)
    where = Path(args.output or args.family)
    size = sum((where / name).stat().st_size for name in ("router.safetensors", "router_config.json"))
    best = next(score for score in scores[0] if score.layer == router.layer)
    result = {
        "output": str(where),
        "labels": router.labels,
        "prompts": {label: len(own) for label, own in prompts.items()},
        "calibration": sources or None,
        "layer": router.layer,
        "layers": [vars(score) for score in scores[0]],
        "temperature": router.temperature,
        "threshold": router.threshold,
        "accuracy": best.accuracy,
        "bytes": size,
        "seconds": round(seconds, 3),
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    header = ["expert", "prompts", *(["calibrated on"] if sources else [])]
    counts = [
        [label, f"{len(own):,}", *([sources[label]] if sources else [])] for label, own in sorted(prompts.items())
    ]
    print(plain_table(header, counts, right=True))
    print()
    rows = [[str(s.layer), f"{s.accuracy:.2%}", f"{s.loss:.4f}"] for s in scores[0]]
    print(plain_table(["layer", "accuracy", "loss"], rows, right=True))
    print(
        f"\n{where}: layer {router.layer}, abstains below {router.threshold:.2f}; {best.accuracy:.2%} right on "
        f"prompts unlike those it was fitted to; {size:,} bytes ({seconds:.1f} s)"
    )


def _evaluate(args: argparse.Namespace) -> None:
    from ..plotting import require_matplotlib
    from ..routing.data import read_prompts
    from ..routing.evaluation import evaluate
    from ..routing.plotting import router_figure

    if args.plot is not None:
        require_matplotlib()
    prompts = read_prompts(args.data)
    model = _load(args, args.router)
    output = _routed(model, [prompt for own in prompts.values() for prompt in own])
    evaluation = evaluate(output, [label for label, own in prompts.items() for _ in own])
    if args.plot is not None:
        router_figure(evaluation).savefig(args.plot)
    print(json.dumps(evaluation.to_dict(), indent=2) if args.json else _render(evaluation))


def _routed(model: Any, prompts: list[Prompt]) -> RouterOutput:
    """``model.route`` with a progress bar where somebody watches."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from ..routing.output import joined

    parts = []
    with tqdm(total=len(prompts), desc="Routing", unit="prompt", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, max(len(prompts), 1), _AT_ONCE):  # without prompts, evaluate() says so
            parts.append(model.route(prompts[start : start + _AT_ONCE]))
            bar.update(len(parts[-1].experts))
    return joined(parts)


def _render(evaluation: Evaluation) -> str:
    header = ["right \\ routed to", *evaluation.labels, "abstained", "recall", "precision"]
    rows = [
        [label, *map(str, counts), f"{evaluation.recall[label]:.2%}", f"{evaluation.precision[label]:.2%}"]
        for label, counts in zip(evaluation.labels, evaluation.confusion.tolist(), strict=True)
    ]
    return (
        f"{plain_table(header, rows, right=True)}\n\n"
        f"{int(evaluation.confusion.sum()):,} prompts: {evaluation.accuracy:.2%} right; "
        f"{evaluation.coverage:.2%} routed, of which {evaluation.routed_accuracy:.2%} right; "
        f"calibration error {evaluation.calibration_error:.2%}"
    )


def _explain(args: argparse.Namespace) -> None:
    model = _load(args, args.router)
    explained = _explained(model, args.prompt)
    if args.json:
        print(json.dumps(explained, indent=2))
        return
    rows = [[label, f"{p:.2%}"] for label, p in explained["probabilities"].items()]
    print(plain_table(["expert", "probability"], rows, right=True))
    print(f"\n{_verdict(explained)}")


def _try(args: argparse.Namespace) -> None:
    model = _load(args, args.router)
    asks = sys.stdin.isatty() and not args.json
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a line in another encoding ends nothing
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        explained = _explained(model, line.rstrip("\n"))
        print(json.dumps(explained) if args.json else _verdict(explained), flush=True)


def _explained(model: Any, prompt: str) -> dict[str, Any]:
    output = model.route(prompt)
    likely = sorted(zip(output.labels, output.probabilities[0].tolist(), strict=True), key=lambda pair: -pair[1])
    return {
        "prompt": prompt,
        "expert": output.experts[0] or "base",
        "abstained": bool(output.abstained[0]),
        "probabilities": dict(likely),
        "threshold": model.router.threshold,
    }


def _verdict(explained: dict[str, Any]) -> str:
    label, probability = next(iter(explained["probabilities"].items()))
    if not explained["abstained"]:
        return f"{explained['expert']} ({probability:.0%})"
    unsure = probability < explained["threshold"]
    why = f"{label} is likeliest, at {probability:.0%}" if unsure else "it is like no prompt that the router knows"
    return f"{explained['expert']}, as the router abstains: {why}"
