"""``meswitch generate``: answers of chosen experts to prompts."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .device import usable_device

_EXAMPLE = """examples:
  meswitch generate me/family --expert math -p "What is 17 times 23?"
  meswitch generate me/base --expert math=me/math-delta --expert code=./code-delta -p "Sort a list." --json
  echo "What is 17 times 23?" | meswitch generate me/family --expert math
"""
#: How the base is named among experts; the name is reserved.
_BASE = "base"


def _expert(text: str) -> tuple[str, str | None]:
    name, separator, delta = text.partition("=")
    if not name or (separator and not delta):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME=DELTA")
    return name, delta or None


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "generate",
        help="answer prompts with one or more experts",
        description="Answer each prompt with each expert named. Without --expert the base answers, or the family's "
        "default expert. A chat template is applied where the expert's tokenizer has one.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="BASE_OR_FAMILY", help="base or family: a Hub id or a folder")
    parser.add_argument(
        "--expert",
        dest="experts",
        metavar="NAME[=DELTA]",
        type=_expert,
        action="append",
        default=[],
        help="expert to ask: a name of the family, or a name for the delta repo to attach; 'base' is the base itself, "
        "'auto' whom the family's router picks; may be repeated",
    )
    parser.add_argument(
        "-p", "--prompt", dest="prompts", action="append", metavar="TEXT", help="may be repeated; default: stdin"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--plain", action="store_true", help="apply no chat template")
    parser.add_argument("--device", help="torch device; default: an accelerator if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON array of prompt, expert and text")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.max_new_tokens < 1:
        args.parser.error(f"argument --max-new-tokens: {args.max_new_tokens} is below 1")
    if args.temperature < 0:
        args.parser.error(f"argument --temperature: {args.temperature} is below 0")
    if len({name for name, _ in args.experts}) < len(args.experts):
        args.parser.error("argument --expert: a name is given twice")
    if args.prompts is None and sys.stdin.isatty():
        args.parser.error("no prompt: give -p TEXT, or pipe one in")
    device = usable_device(args)
    prompts = args.prompts if args.prompts is not None else [sys.stdin.read().rstrip("\n")]
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            which = "what standard input holds" if args.prompts is None else f"-p number {number}"
            args.parser.error(f"an empty prompt: {which}. Give -p TEXT, or pipe text in")

    from tqdm import tqdm

    from ..generation import AUTO

    model = _load(args).to(device).eval()
    asked = [None if name == _BASE else name for name, _ in args.experts] or [model.active_expert]
    pairs = [(prompt, expert) for prompt in prompts for expert in asked]
    # One answer needs no bar, and several are worth one only where somebody watches.
    watched = tqdm(pairs, desc="Answering", unit="answer", disable=None if len(pairs) > 1 else True)
    answers = []
    for prompt, named in watched:
        expert = model.route(prompt).experts[0] if named == AUTO else named
        answers.append({"prompt": prompt, "expert": expert or _BASE, "text": _answer(model, prompt, expert, args)})
    if args.json:
        print(json.dumps(answers, indent=2))
        return
    for answer in answers:
        print(answer["text"] if len(answers) == 1 else f"[{answer['expert']}] {answer['text']}")


def _load(args: argparse.Namespace) -> Any:
    from .. import MESwitchModelForCausalLM

    model = MESwitchModelForCausalLM.from_pretrained(args.model, dtype="auto")
    for name, delta in args.experts:
        if delta is not None:
            model.load_adapter(delta, adapter_name=name)
    return model


def _answer(model: Any, prompt: str, expert: str | None, args: argparse.Namespace) -> str:
    import torch

    tokenizer = model.tokenizer_for(expert)
    if tokenizer.chat_template and not args.plain:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    with torch.inference_mode():
        output = model.generate(
            **inputs.to(model.device), expert=expert, max_new_tokens=args.max_new_tokens, **sampling
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
