"""Accuracy of a family whose router picks the expert against the same family told by hand which expert to use.

    python -m benchmarks.quality run --work-dir work --methods none \\
        --experts math-light,code-light,json-light,instruct-light
    python -m benchmarks.routing.end_to_end --base work/base --work-dir work --data work/data --device cuda

The experts are those of ``benchmarks/quality``, compressed by the package with its default settings. The router is
fitted to prompts that the experts were trained on and reads each held-out prompt as a chat. Both runs generate the
same batches, of all tasks mixed, so that what differs is the choice of the expert alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import device_name, provenance, write_result
from benchmarks.quality.cells import ExpertId
from benchmarks.quality.data import held_out, load_split
from benchmarks.quality.experts import ExpertFolder, write_checkpoint
from benchmarks.quality.measures import difference_interval
from benchmarks.quality.tasks import TASKS, Item
from benchmarks.quality.text import prompt_text
from transformers_meswitch import HeadRouter, MESwitchConfig, MESwitchModelForCausalLM, compress
from transformers_meswitch.compression.calibration import DEFAULT

__all__ = ["compare", "load_family"]

_RESULT = Path(__file__).parents[1] / "results" / "routing_end_to_end.json"
_TRAIN_PROMPTS = 400


def conversation(item: Item) -> list[dict[str, str]]:
    """The item as a user's message."""
    return [{"role": "user", "content": item.prompt}]


def load_family(
    base: Path, work: Path, strength: str, seed: int, device: str, calibration: str | None = DEFAULT
) -> Any:
    """The quality benchmark's experts of one strength and seed as deltas over their base.

    Args:
        base: folder of the base's checkpoint.
        work: the benchmark's work folder, with the experts trained.
        strength: ``"light"`` or ``"heavy"``.
        seed: of the training.
        device: where to compress and run.
        calibration: of :func:`~transformers_meswitch.compress`.
    """
    with tempfile.TemporaryDirectory() as folder:
        deltas = {task: Path(folder) / task for task in TASKS}
        # On a GPU side by side: most of the time goes into steps that leave the device waiting for the host.
        workers = len(TASKS) if device == "cuda" else 1
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            running = []
            for task, delta in deltas.items():
                weights = ExpertFolder(work / "experts" / str(ExpertId(task, strength, seed))).load()
                expert = write_checkpoint(base, weights, Path(folder) / f"expert-{task}")
                running.append(pool.submit(_compress, base, expert, delta, calibration, device))
            for future in running:
                future.result()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = MESwitchModelForCausalLM.from_pretrained(base, experts=deltas, dtype=dtype, device_map=device)
    return model.eval()


def _compress(base: Path, expert: Path, delta: Path, calibration: str | None, device: str) -> None:
    compress(base, expert, delta, MESwitchConfig(), calibration, device=device)


@torch.no_grad()
def answers(model: Any, items: Sequence[Item], experts: Sequence[str], batch: int, new_tokens: int) -> list[str]:
    """Greedy answers of the named experts, ``"auto"`` among them."""
    tokenizer = model.tokenizer_for(None)
    tokenizer.padding_side = "left"
    texts: list[str] = []
    for start in range(0, len(items), batch):
        part = slice(start, start + batch)
        prompts = [prompt_text(item) for item in items[part]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        ids = model.generate(**inputs, expert=list(experts[part]), max_new_tokens=new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def compare(
    model: Any, data: Path, seed: int, count: int, batch: int, new_tokens: int | None = None
) -> dict[str, Any]:
    """Fit the router, answer ``count`` held-out items of each task both ways, and score both.

    Args:
        model: the family.
        data: folder of the splits.
        seed: whose held-out items.
        count: of each task.
        batch: prompts generated at once.
        new_tokens: of an answer; by default the tasks' own limit.
    """
    splits = {name: load_split(data, task, "train")[:_TRAIN_PROMPTS] for name, task in TASKS.items()}
    router = HeadRouter.train(model, {name: [conversation(item) for item in own] for name, own in splits.items()})
    model.set_router(router)
    rows = [
        (name, item) for name, task in TASKS.items() for item in held_out(load_split(data, task, "test"), seed, count)
    ]
    random.Random(0).shuffle(rows)
    items, right = [item for _, item in rows], [name for name, _ in rows]
    limit = max(task.max_new_tokens for task in TASKS.values()) if new_tokens is None else new_tokens
    chosen = model.route([conversation(item) for item in items]).experts
    scores = {}
    for way, experts in (("named", right), ("auto", ["auto"] * len(rows))):
        texts = answers(model, items, experts, batch, limit)
        scores[way] = [TASKS[name].score(text, item) for text, (name, item) in zip(texts, rows, strict=True)]
    lost, half = difference_interval(scores["named"], scores["auto"])
    of = {name: [place for place, own in enumerate(right) if own == name] for name in TASKS}
    return {
        "items": len(rows),
        "named": sum(scores["named"]) / len(rows),
        "auto": sum(scores["auto"]) / len(rows),
        "points_lost": round(100 * lost, 4),
        "points_lost_half_width": round(100 * half, 4),
        "routed_right": sum(a == b for a, b in zip(chosen, right, strict=True)) / len(rows),
        "layer": router.layer,
        "tasks": {
            name: {
                "named": sum(scores["named"][place] for place in own) / len(own),
                "auto": sum(scores["auto"][place] for place in own) / len(own),
                "routed_right": sum(chosen[place] == name for place in own) / len(own),
            }
            for name, own in of.items()
        },
    }


def main() -> None:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base's checkpoint")
    parser.add_argument("--work-dir", type=Path, required=True, help="of benchmarks.quality, with the experts trained")
    parser.add_argument("--data", type=Path, required=True, help="folder of the splits")
    parser.add_argument("--strength", default="light", help="of the training: light or heavy")
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the held-out items")
    parser.add_argument("--items", type=int, default=500, help="held-out items of each task")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts generated at once")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=_RESULT)
    args = parser.parse_args()
    model = load_family(args.base, args.work_dir, args.strength, args.seed, args.device)
    found = compare(model, args.data, args.seed, args.items, args.batch_size)
    found = {"strength": args.strength, "seed": args.seed, **found}
    write_result(args.output, {**provenance("benchmarks.routing.end_to_end", device_name(args.device)), **found})
    print("| task | expert named by hand | picked by the router | routed to it |\n|---|---:|---:|---:|")
    for name, row in {**found["tasks"], "all": found}.items():
        print(f"| {name} | {row['named']:.2%} | {row['auto']:.2%} | {row['routed_right']:.2%} |")
    print(f"lost: {found['points_lost']:.2f} ± {found['points_lost_half_width']:.2f} points")


if __name__ == "__main__":
    main()
