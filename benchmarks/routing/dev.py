"""Choose without looking at the test: train on three groups of the training sources, judge on the fourth, in turn.

    python -m benchmarks.routing.dev --base SMOLLM2 --features FILE

Prompts that are judged are as their source has them. A row says what share of a domain's prompts has the right expert
as its likeliest, over all groups together, and the mean over domains; the choice of layer, rank and frames is the
table's, where a router chooses its layer itself.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import device_name, provenance, write_result
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.routing.discriminant import Discriminant
from transformers_meswitch.routing.head_fit import RANK
from transformers_meswitch.routing.hidden_states import early_layers
from transformers_meswitch.routing.projection import project
from transformers_meswitch.routing.statistics import ClassStatistics

from . import head
from .filling import framed
from .sources import EIGHT, FOUR
from .training import FRAMED, GROUPS, training_sources

__all__ = ["kept_out"]

#: By domain, of each source: its group, features ``[prompts, width]`` that are trained on, and those that are judged.
Sources = Mapping[str, Sequence[tuple[int, Any, Any]]]
_SHRINKAGE = 0.1


def kept_out(sources: Sources, rank: int, shrinkage: float = _SHRINKAGE) -> dict[str, float]:
    """By domain, the share of prompts that go right in the groups that the head was not trained on."""
    points = {
        domain: [(group, project(train, rank), project(judge, rank)) for group, train, judge in own]
        for domain, own in sources.items()
    }
    right = dict.fromkeys(points, 0)
    for group in range(GROUPS):
        trained = {domain: torch.cat([x for g, x, _ in own if g != group]) for domain, own in points.items()}
        statistics = ClassStatistics.of(trained)
        fitted = Discriminant.of(statistics, shrinkage)
        for domain, own in points.items():
            judged = torch.cat([x for g, _, x in own if g == group])
            chosen = fitted.scores(judged).argmax(dim=1)
            right[domain] += int((chosen == statistics.labels.index(domain)).sum())
    return {domain: right[domain] / sum(len(x) for _, _, x in own) for domain, own in points.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="SmolLM2-135M-Instruct: folder or Hub id")
    parser.add_argument("--features", type=Path, help="file that keeps what the base has read")
    parser.add_argument("--output", default="benchmarks/results/routing_dev.json")
    args = parser.parse_args()
    model = MESwitchModelForCausalLM.from_pretrained(args.base, experts={}, dtype=torch.float32).eval()
    texts, layers = training_sources(EIGHT), early_layers(model)
    result = provenance("benchmarks.routing.dev", device_name("cpu")) | {"shrinkage": _SHRINKAGE, "rows": []}
    for share in (0.0, FRAMED):
        wanted = {}
        for domain, own in texts.items():
            for number, (_, prompts) in enumerate(own):
                wanted[f"{domain} {number} train"] = framed(prompts, share)
                wanted[f"{domain} {number} judge"] = prompts
        known = head.read(model, wanted, args.features)
        read = {
            domain: [
                (group, known[f"{domain} {number} train"], known[f"{domain} {number} judge"])
                for number, (group, _) in enumerate(own)
            ]
            for domain, own in texts.items()
        }
        ranks = (128, RANK, model.config.hidden_size)
        for domains, layer, rank in itertools.product((FOUR, EIGHT), layers[2::3], ranks):
            at = layers.index(layer)
            recall = kept_out(
                {domain: [(g, x[:, at], y[:, at]) for g, x, y in read[domain]] for domain in domains},
                rank,
            )
            mean = sum(recall.values()) / len(recall)
            row = {"domains": len(domains), "framed": share, "layer": layer, "rank": rank, "mean": mean}
            result["rows"].append(row | {"recall": recall})
            listed = " ".join(f"{label[:5]} {value:.0%}" for label, value in recall.items())
            name = f"{len(domains)} domains, framed {share:.0%}, layer {layer}, rank {rank}"
            print(f"{name}: {mean:.2%} | {listed}", flush=True)
        write_result(Path(args.output), result)


if __name__ == "__main__":
    main()
