"""Accuracy, calibration, abstention, bytes and time of routers on frozen prompts of sources they were not trained on.

    python -m benchmarks.routing --base SMOLLM2 --encoder MINILM
    python -m benchmarks.routing --base SMOLLM2 --parts cost
    python -m benchmarks.routing --shape mistral-7b --device cuda --parts cost

Each part is put into the result file as soon as it is known, beside the parts that are there already, and says itself
when, where and by which command it was measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import device_name, provenance, write_result
from transformers_meswitch import MESwitchModelForCausalLM, MultipleChoiceRouter, RouterOutput
from transformers_meswitch.routing.evaluation import evaluate

from . import head
from .cost import cost, shaped
from .encoder import EncoderPeer
from .freeze import check_frozen
from .sources import DOMAINS, EIGHT, SETS, hard_set, many_domains, test_prompts
from .training import training_prompts, without_tested

#: Prompts of a domain that the whole base is asked about, as each takes a forward pass of it.
_ASKED = 40
_MANY = 64

Prompts = Mapping[str, Sequence[str]]


def _measured(output: RouterOutput, right: Sequence[str], hard: RouterOutput | None) -> dict[str, Any]:
    found = evaluate(output, right).to_dict()
    if hard is not None:
        rows = [row for row in hard_set() if set(row["experts"]) & set(hard.labels)]
        likeliest = [hard.labels[i] for i in hard.probabilities.argmax(dim=1).tolist()]
        good = [label in row["experts"] for label, row in zip(likeliest, rows, strict=True)]
        routed = [g for g, out in zip(good, hard.abstained.tolist(), strict=True) if not out]
        found["hard"] = {
            "prompts": len(good),
            "acceptable": sum(good) / len(good),
            "abstained": 1 - len(routed) / len(good),
            "acceptable_of_routed": sum(routed) / len(routed) if routed else None,
        }
    return found


def _hard_prompts(domains: Sequence[str]) -> list[str]:
    return [row["prompt"] for row in hard_set() if set(row["experts"]) & set(domains)]


def _flat(prompts: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    return [p for own in prompts.values() for p in own], [label for label, own in prompts.items() for _ in own]


def _bytes(router: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        router.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).iterdir())


@cache
def _test() -> dict[str, list[str]]:
    check_frozen()
    return test_prompts(EIGHT)


@cache
def _train() -> dict[str, list[str]]:
    """What is trained on, without what a test happens to ask too."""
    return without_tested(training_prompts(EIGHT), _test())


def _counts() -> dict[str, dict[str, int]]:
    return {label: {"train": len(_train()[label]), "test": len(_test()[label])} for label in EIGHT}


def _head(model: Any, features_file: Path | None) -> dict[str, Any]:
    train, test = _train(), _test()
    start = time.perf_counter()
    features = head.read(model, train, features_file)
    result: dict[str, Any] = {"prompts": _counts()}
    if features_file is None:  # else most of it was read before
        result["reading_seconds"] = time.perf_counter() - start
    for name, domains in SETS.items():
        start = time.perf_counter()
        router = head.fit(model, {label: features[label] for label in domains})
        seconds = time.perf_counter() - start
        prompts, right = _flat({label: test[label] for label in domains})
        hard = head.ask(router, model, _hard_prompts(domains))
        result[name] = _measured(head.ask(router, model, prompts), right, hard) | {
            "fit_seconds": seconds,
            "bytes": _bytes(router),
            "layer": router.layer,
            "shrinkage": router.shrinkage,
            "threshold": router.threshold,
            "temperature": router.temperature,
        }
    return result


def _peer(folder: str) -> dict[str, Any]:
    peer = EncoderPeer(folder)
    embedded = {label: peer.embed(own) for label, own in _train().items()}
    tested = {label: peer.embed(own) for label, own in _test().items()}
    result: dict[str, Any] = {"prompts": _counts(), "bytes": peer.bytes}
    for name, domains in SETS.items():
        fitted = peer.fit({label: embedded[label] for label in domains})
        right = [label for label in domains for _ in tested[label]]
        output = peer.ask(fitted, torch.cat([tested[label] for label in domains]))
        hard = peer.ask(fitted, peer.embed(_hard_prompts(domains)))
        result[name] = _measured(output, right, hard)
    return result


def _zero_shot(model: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, domains in SETS.items():
        router = MultipleChoiceRouter({label: DOMAINS[label] for label in domains}, threshold=0.0)
        prompts, right = _flat({label: _test()[label][:_ASKED] for label in domains})
        rows = head.window_ids(model.tokenizer_for(None), prompts, router.window)
        result[name] = _measured(router.route_ids(model, rows, router.labels), right, None)
    return result


def _many(model: Any) -> dict[str, Any]:
    train, test = many_domains(_MANY)
    router = head.fit(model, head.read(model, train))
    prompts, right = _flat(test)
    return _measured(head.ask(router, model, prompts), right, None) | {"bytes": _bytes(router)}


@cache
def _base(name: str) -> Any:
    return MESwitchModelForCausalLM.from_pretrained(name, experts={}, dtype=torch.float32).eval()


def _cost(args: argparse.Namespace) -> dict[str, Any]:
    if args.shape is None:
        return {f"base_{args.device}": cost(_base(args.base).to(args.device))}
    return {f"{args.shape}_{args.device}": cost(shaped(args.shape, args.device))}


#: By name, in the order of what they take; a part may add to what an earlier run of it found (``cost``: elsewhere).
_PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "head": lambda args: _head(_base(args.base), args.features),
    "encoder": lambda args: _peer(args.encoder),
    "many": lambda args: _many(_base(args.base)),
    "multiple_choice_zero_shot": lambda args: _zero_shot(_base(args.base)),
    "cost": _cost,
}


def _put(result: dict[str, Any], part: str, found: dict[str, Any], measured: Mapping[str, Any]) -> None:
    """Where and when goes with each part, and with each place that the cost was measured at."""
    if part == "cost":
        result.setdefault(part, {}).update({place: {**measured, **row} for place, row in found.items()})
    else:
        result[part] = {**measured, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="SmolLM2-135M-Instruct: folder or Hub id")
    parser.add_argument("--encoder", help="all-MiniLM-L6-v2: folder, for the part encoder")
    parser.add_argument("--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS), help="all by default")
    parser.add_argument("--shape", choices=["mistral-7b"], help="cost: a base of this shape with random weights")
    parser.add_argument("--device", default="cpu", help="cost: where to measure")
    parser.add_argument("--features", type=Path, help="file that keeps what the base has read of the training prompts")
    parser.add_argument("--output", default="benchmarks/results/routing.json")
    args = parser.parse_args()
    if args.base is None and not (args.shape and args.parts == ["cost"]):
        parser.error("--base is needed for all but --shape with --parts cost")
    if args.encoder is None and "encoder" in args.parts:
        parser.error("--encoder is needed for the part encoder; or name the others with --parts")
    output = Path(args.output)
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for part in args.parts:
        device = args.device if part == "cost" else "cpu"
        _put(result, part, _PARTS[part](args), provenance("benchmarks.routing", device_name(device)))
        write_result(output, result)
    print(_table(result))


def _table(result: Mapping[str, Any]) -> str:
    """Of the parts that are known."""
    lines = ["router                 domains  accuracy  coverage  right of routed  calibration error  hard ok"]
    for name in ("head", "encoder", "multiple_choice_zero_shot"):
        for domains in SETS if name in result else ():
            row = result[name][domains]
            hard = f"{row['hard']['acceptable']:7.1%}" if "hard" in row else "      -"
            lines.append(
                f"{name[:22]:22} {domains:>7}  {row['accuracy']:8.2%}  {row['coverage']:8.2%}  "
                f"{row['routed_accuracy'] or 0:15.2%}  {row['calibration_error']:17.2%}  {hard}"
            )
    if many := result.get("many"):
        lines.append(f"{_MANY} simulated domains: {many['accuracy']:.2%}, {many['bytes']:,} bytes")
    for place, row in result.get("cost", {}).items():
        lines.append(
            f"{place}: {row['share_of_prefill']:.1%} of the prefill of {row['prompt_tokens']} tokens "
            f"({row['share_of_prefill_many']:.1%} with {_MANY} experts), layer {row['layer']}, window {row['window']}"
        )
        if "captured_seconds_by_experts" in row:
            busy, captured = (
                row[name] / row["prefill_seconds"] for name in ("route_device_seconds", "captured_device_seconds")
            )
            lines.append(
                f"  captured: {row['captured_share_of_prefill']:.1%} ({row['captured_share_of_prefill_many']:.1%}); "
                f"the device is busy for {busy:.1%}, captured for {captured:.1%}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
