"""Accuracy, calibration, abstention, bytes and time of routers on frozen prompts of sources they were not trained on.

python -m benchmarks.routing --base SMOLLM2 --encoder MINILM
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import device_name, provenance, write_result
from transformers_meswitch import MESwitchModelForCausalLM, MultipleChoiceRouter, RouterOutput
from transformers_meswitch.routing.evaluation import evaluate

from . import head
from .encoder import EncoderPeer
from .freeze import check_frozen
from .sources import EIGHT, FOUR, hard_set, many_domains, test_prompts, training_prompts

_SETS = {"four": FOUR, "eight": EIGHT}
_DOMAINS = {
    "instruction": "general knowledge, advice and conversation",
    "mathematics": "mathematics",
    "code": "computer programming",
    "chinese": "anything in Chinese",
    "sql": "SQL and databases",
    "german": "anything in German",
    "medical": "medicine and health",
    "legal": "law and contracts",
}
#: Prompts of a domain that the whole base is asked about, as each takes a forward pass of it.
_ASKED = 40
_MANY = 64
_LONG = 2048
_REPEATS = 5


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


def _median_seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _bytes(router: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        router.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def _head(model: Any, train: Mapping[str, Any], test: Mapping[str, Sequence[str]]) -> tuple[dict[str, Any], Any]:
    result: dict[str, Any] = {}
    start = time.perf_counter()
    features = head.read(model, train)
    result["reading_seconds"] = time.perf_counter() - start
    routers = {}
    for name, domains in _SETS.items():
        start = time.perf_counter()
        router = routers[name] = head.fit(model, {label: features[label] for label in domains})
        seconds = time.perf_counter() - start
        prompts, right = _flat({label: test[label] for label in domains})
        hard = head.ask(router, model, _hard_prompts(domains))
        result[name] = _measured(head.ask(router, model, prompts), right, hard) | {
            "fit_seconds": seconds,
            "bytes": _bytes(router),
            "layer": router.layer,
            "threshold": router.threshold,
            "temperature": router.temperature,
        }
    return result, routers["four"]


def _peer(folder: str, train: Mapping[str, Any], test: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    peer = EncoderPeer(folder)
    embedded = {label: peer.embed(own) for label, own in train.items()}
    tested = {label: peer.embed(own) for label, own in test.items()}
    result: dict[str, Any] = {"bytes": peer.bytes}
    for name, domains in _SETS.items():
        fitted = peer.fit({label: embedded[label] for label in domains})
        right = [label for label in domains for _ in tested[label]]
        output = peer.ask(fitted, torch.cat([tested[label] for label in domains]))
        hard = peer.ask(fitted, peer.embed(_hard_prompts(domains)))
        result[name] = _measured(output, right, hard)
    return result


def _zero_shot(model: Any, test: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, domains in _SETS.items():
        router = MultipleChoiceRouter({label: _DOMAINS[label] for label in domains}, threshold=0.0)
        prompts, right = _flat({label: test[label][:_ASKED] for label in domains})
        rows = head.window_ids(model.tokenizer_for(None), prompts, router.window)
        result[name] = _measured(router.route_ids(model, rows, router.labels), right, None)
    return result


def _many(model: Any) -> tuple[dict[str, Any], Any]:
    train, test = many_domains(_MANY)
    router = head.fit(model, head.read(model, train))
    prompts, right = _flat(test)
    return _measured(head.ask(router, model, prompts), right, None) | {"bytes": _bytes(router)}, router


def _cost(model: Any, few: Any, many: Any) -> dict[str, Any]:
    ids = torch.randint(100, model.config.vocab_size, (1, _LONG), generator=torch.Generator().manual_seed(0))
    row = [ids[0, : head.WINDOW].tolist()]
    with torch.no_grad():
        prefill = _median_seconds(lambda: model(ids, logits_to_keep=1))
    times = {
        name: _median_seconds(lambda router=router: router.route_ids(model, row, router.labels))
        for name, router in (("four", few), ("many", many))
    }
    return {
        "prompt_tokens": _LONG,
        "prefill_seconds": prefill,
        "route_seconds": times,
        "layers": {"four": few.layer, "many": many.layer},
        "share_of_prefill": times["four"] / prefill,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="SmolLM2-135M-Instruct: folder or Hub id")
    parser.add_argument("--encoder", required=True, help="all-MiniLM-L6-v2: folder")
    parser.add_argument("--output", default="benchmarks/results/routing.json")
    args = parser.parse_args()
    check_frozen()
    train, test = training_prompts(EIGHT), test_prompts(EIGHT)
    model = MESwitchModelForCausalLM.from_pretrained(args.base, experts={}, dtype=torch.float32).eval()
    result: dict[str, Any] = provenance("benchmarks.routing", device_name("cpu"))
    result["prompts"] = {label: {"train": len(train[label]), "test": len(test[label])} for label in EIGHT}
    # Each part is written as soon as it is known: on a small machine all of them take an hour.
    result["head"], few = _head(model, train, test)
    write_result(Path(args.output), result)
    result["encoder"] = _peer(args.encoder, train, test)
    write_result(Path(args.output), result)
    result["many"], many = _many(model)
    result["cost"] = _cost(model, few, many)
    write_result(Path(args.output), result)
    result["multiple_choice_zero_shot"] = _zero_shot(model, test)
    write_result(Path(args.output), result)
    print(_table(result))


def _table(result: Mapping[str, Any]) -> str:
    lines = ["router                 domains  accuracy  coverage  right of routed  calibration error  hard ok"]
    for name in ("head", "encoder", "multiple_choice_zero_shot"):
        for domains in _SETS:
            row = result[name][domains]
            hard = f"{row['hard']['acceptable']:7.1%}" if "hard" in row else "      -"
            lines.append(
                f"{name[:22]:22} {domains:>7}  {row['accuracy']:8.2%}  {row['coverage']:8.2%}  "
                f"{row['routed_accuracy'] or 0:15.2%}  {row['calibration_error']:17.2%}  {hard}"
            )
    many, cost = result["many"], result["cost"]
    lines.append(f"{_MANY} simulated domains: {many['accuracy']:.2%}, {many['bytes']:,} bytes")
    lines.append(f"{cost['share_of_prefill']:.1%} of the prefill of {_LONG} tokens")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
