"""The paper's router before and after fine-tuning (ME-Switch, Figure 5): a language model is asked for the domain.

    python -m benchmarks.routing.multiple_choice --base SMOLLM2 --asked 100
    python -m benchmarks.routing.multiple_choice --base SMOLLM2 --device cuda --steps 800 --batch-size 32 --lr 1e-4

SmolLM2 is fine-tuned by ``examples/train_multiple_choice_router.py`` on the training prompts, once for four and once
for eight domains, and asked about all frozen test prompts before and after (``--asked``: the first of each domain).
Every prompt is asked twice, with the options in one order and in the reverse, which shows what is left of a liking for
places. What the model prefers for queries that say nothing is divided out and left in: the router divides it out of a
model as it is, and leaves it in one that was fine-tuned. Each step is put into the result file as soon as it is known,
and a step that is there with the same settings is not done again: name another file where the script has changed. The
default of 200 steps is too few for eight domains.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import device_name, provenance, write_result
from transformers_meswitch import MESwitchModelForCausalLM, MultipleChoiceRouter, RouterOutput
from transformers_meswitch.routing.evaluation import evaluate
from transformers_meswitch.routing.letters import letter_prior
from transformers_meswitch.routing.question import Question
from transformers_meswitch.routing.window import window_ids

from .freeze import check_frozen
from .sources import DOMAINS, SETS, test_prompts
from .training import training_prompts, without_tested

__all__ = ["PART", "asked", "before_and_after"]

#: Where it goes in the result file.
PART = "multiple_choice"
#: What of a row the router's own accuracy is, and the accuracy if it did the other thing with the letters' prior.
_USED = {"before": ("accuracy", "accuracy_without_prior"), "after": ("accuracy_without_prior", "accuracy")}
_SCRIPT = Path(__file__).parents[2] / "examples" / "train_multiple_choice_router.py"

Prompts = Mapping[str, Sequence[str]]


def asked(model: Any, domains: Mapping[str, str], window: int, prompts: Prompts) -> dict[str, Any]:
    """What a model makes of prompts whose domain is known.

    Args:
        model: a model with experts, whose base is asked.
        domains: label to what the option says, in the order of the options.
        window: tokens of a prompt that are read at most.
        prompts: by label.

    Returns:
        The measures of :func:`~transformers_meswitch.routing.evaluation.evaluate`, and with the options in reverse
        order ``accuracy_reversed`` and ``same_reversed``, the share of prompts with the same answer; all of these with
        the letters that the model prefers anyway divided out. ``without_prior``: the same with them left in, of which
        ``accuracy_without_prior`` is the accuracy.
    """
    tokenizer = model.tokenizer_for(None)
    texts = [text for own in prompts.values() for text in own]
    right = [label for label, own in prompts.items() for _ in own]
    rows = window_ids(tokenizer, texts, window)
    backwards = dict(reversed(domains.items()))
    orders = [
        MultipleChoiceRouter(options, window=window, threshold=0.0).route_ids(model, rows, list(options))
        for options in (domains, backwards)
    ]
    plain = [_with_prior(model, options, found) for options, found in zip((domains, backwards), orders, strict=True)]
    without = _measured(plain, right)
    return _measured(orders, right) | {"accuracy_without_prior": without["accuracy"], "without_prior": without}


def _with_prior(model: Any, domains: Mapping[str, str], output: RouterOutput) -> RouterOutput:
    """What was divided out of an output multiplied in again, which takes no pass of the model."""
    tokenizer = model.tokenizer_for(None)
    with model._meswitch_switch.rows([None]):
        prior = letter_prior(model, tokenizer, Question.of(tokenizer, list(domains.values())))
    likely = torch.softmax(output.probabilities.double().log() + prior, dim=1)
    return RouterOutput(output.experts, likely, output.labels, output.abstained)


def _measured(orders: Sequence[RouterOutput], right: Sequence[str]) -> dict[str, Any]:
    """The first of two outputs, and how like the second it is."""
    answers = [_likeliest(output) for output in orders]
    return evaluate(orders[0], right).to_dict() | {
        "accuracy_reversed": _share(answers[1], right),
        "same_reversed": _share(*answers),
    }


def _likeliest(output: RouterOutput) -> list[str]:
    return [output.labels[i] for i in output.probabilities.argmax(dim=1).tolist()]


def _share(found: Sequence[str], right: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(found, right, strict=True)) / len(right)


def before_and_after(
    base: str,
    train: Prompts,
    test: Prompts,
    *,
    settings: Mapping[str, Any],
    device: str,
    known: Mapping[str, Any],
    put: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Ask a base, fine-tune it, and ask again.

    Args:
        base: Hub id or folder.
        train: prompts by domain.
        test: prompts of the same domains.
        settings: ``window``, and ``steps``, ``batch_size``, ``lr`` and ``seed`` of the training.
        device: ``"cpu"`` or ``"cuda"``.
        known: what was found before, with the same settings; the steps in it are passed over.
        put: takes what is known so far, after each step.
    """
    domains = {label: DOMAINS[label] for label in train}
    result = dict(known)
    if "before" not in result:
        result["before"] = asked(_loaded(base, device), domains, settings["window"], test)
        put(result)
    if "after" not in result:
        options = {name: value for name, value in settings.items() if name != "window"}
        router = MultipleChoiceRouter(domains, window=settings["window"])
        with tempfile.TemporaryDirectory() as folder:
            tuned = runpy.run_path(str(_SCRIPT))["fine_tune"](
                base, router, train, Path(folder), where=device, **options
            )
            result["after"] = asked(_loaded(tuned.repo, device), domains, settings["window"], test)
        put(result)
    return result


def _loaded(name: str, device: str) -> Any:
    return MESwitchModelForCausalLM.from_pretrained(name, experts={}, dtype=torch.float32).to(device).eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="SmolLM2-135M-Instruct: folder or Hub id")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="both by default")
    parser.add_argument("--asked", type=int, metavar="N", help="only the first N test prompts of each domain")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/routing.json"))
    args = parser.parse_args(argv)
    check_frozen()
    settings = {name: getattr(args, name) for name in ("window", "steps", "batch_size", "lr", "seed")}
    for name in args.sets:
        test = {label: own[: args.asked] for label, own in test_prompts(SETS[name]).items()}
        train = without_tested(training_prompts(SETS[name]), test_prompts(SETS[name]))
        head = {
            **provenance("benchmarks.routing.multiple_choice", device_name(args.device)),
            "settings": settings,
            "prompts": {label: {"train": len(train[label]), "test": len(test[label])} for label in test},
        }
        known = _known(args.output, name, head)

        def put(found: dict[str, Any], name: str = name, head: dict[str, Any] = head) -> None:
            # Read anew: other parts may have been put there meanwhile.
            result = _read(args.output)
            result.setdefault(PART, {})[name] = head | found
            write_result(args.output, result)

        found = before_and_after(args.base, train, test, settings=settings, device=args.device, known=known, put=put)
        for when, (used, other) in _USED.items():
            row = found[when]
            print(
                f"{name} domains {when}: {row[used]:.2%} of {row['prompts']} right as the router asks, "
                f"{row[other]:.2%} with the letters' prior {'left in' if when == 'before' else 'divided out'}"
            )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _known(path: Path, name: str, head: Mapping[str, Any]) -> dict[str, Any]:
    """The steps that an earlier run with the same settings and prompts has finished."""
    found = _read(path).get(PART, {}).get(name, {})
    same = all(found.get(key) == head[key] for key in ("settings", "prompts", "device", "versions"))
    return {when: found[when] for when in ("before", "after") if same and when in found}


if __name__ == "__main__":
    main()
