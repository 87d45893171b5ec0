"""Choose without looking at the test: train on three groups of the training sources, judge on the fourth, in turn.

    python -m benchmarks.routing.dev --base SMOLLM2 --features FILE

Prompts that are judged are as their source has them. What is printed is over all groups together, a prompt as much as
another; beside the abstentions of a router it says nothing that it was trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.routing.discriminant import Discriminant
from transformers_meswitch.routing.evaluation import evaluate
from transformers_meswitch.routing.head_fit import RANK, HeadFit, fit_head
from transformers_meswitch.routing.hidden_states import early_layers
from transformers_meswitch.routing.output import RouterOutput, picked
from transformers_meswitch.routing.projection import project

from . import head
from .filling import framed
from .sources import EIGHT, FOUR
from .training import GROUPS, training_sources

__all__ = ["asked", "kept_out"]

#: By domain, of each source: its group, its prompts as they are trained on, and as they are judged.
Sources = Mapping[str, Sequence[tuple[int, Any, Any]]]


def asked(fit: HeadFit, position: int, features: Tensor) -> RouterOutput:
    """What a fitted head says of features ``[prompts, layers, width]``, its layer being at ``position``."""
    points = project(features[:, position], fit.statistics.rank)
    found = Discriminant.of(fit.statistics, fit.shrinkage)
    likely = (found.scores(points) / fit.temperature).softmax(dim=1)
    unsure = (likely.amax(dim=1) < fit.threshold) | (found.distances(points) > fit.distance_limit)
    return picked(likely.float(), fit.statistics.labels, unsure, None)


def kept_out(sources: Sources, layers: Sequence[int], rank: int = RANK) -> dict[str, Any]:
    """How heads do on the groups that they were not trained on, all groups together.

    Args:
        sources: features ``[prompts, layers, width]``.
        layers: their numbers.
        rank: of the heads.
    """
    outputs, right, chosen = [], [], []
    for group in range(GROUPS):
        trained = {
            domain: torch.cat([train for other, train, _ in own if other != group]) for domain, own in sources.items()
        }
        fit = fit_head(trained, layers, rank=rank)
        chosen.append([fit.layer, fit.shrinkage, round(fit.threshold, 3), round(fit.temperature, 2)])
        for domain, own in sources.items():
            judged = torch.cat([judge for other, _, judge in own if other == group])
            outputs.append(asked(fit, list(layers).index(fit.layer), judged))
            right += [domain] * len(judged)
    whole = RouterOutput(
        [expert for output in outputs for expert in output.experts],
        torch.cat([output.probabilities for output in outputs]),
        outputs[0].labels,
        torch.cat([output.abstained for output in outputs]),
    )
    return {**evaluate(whole, right).to_dict(), "chosen": chosen}


def _line(name: str, found: Mapping[str, Any]) -> str:
    recall = " ".join(f"{label[:5]} {value:.0%}" for label, value in found["recall"].items())
    return (
        f"{name:28} {found['accuracy']:.2%} right, {found['coverage']:.1%} routed, of these "
        f"{found['routed_accuracy']:.2%}, calibration error {found['calibration_error']:.2%} | {recall} | "
        f"layer, shrinkage, threshold, temperature {found['chosen']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="SmolLM2-135M-Instruct: folder or Hub id")
    parser.add_argument("--features", type=Path, help="file that keeps what the base has read")
    args = parser.parse_args()
    model = MESwitchModelForCausalLM.from_pretrained(args.base, experts={}, dtype=torch.float32).eval()
    texts = training_sources(EIGHT)
    for share in (0.0, 0.3):
        known: dict[str, list[tuple[int, Any, Any]]] = {domain: [] for domain in texts}
        for domain, own in texts.items():
            for group, prompts in own:
                read = head.read(model, {"train": framed(prompts, share), "judge": prompts}, args.features)
                known[domain].append((group, read["train"], read["judge"]))
        for domains in (FOUR, EIGHT):
            for rank in (64, RANK, 192):
                found = kept_out({domain: known[domain] for domain in domains}, early_layers(model), rank)
                print(_line(f"{len(domains)} domains, framed {share:.0%}, rank {rank}", found), flush=True)


if __name__ == "__main__":
    main()
