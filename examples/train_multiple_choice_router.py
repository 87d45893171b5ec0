"""Fine-tune a causal LM to answer a router's multiple-choice question, as ME-Switch does; measure before and after.

    python examples/train_multiple_choice_router.py --model me/small-lm --data prompts.jsonl --test held-out.jsonl \\
        --domain math="mathematics" --domain code="programming" -o choice-router

The options are shuffled each time that an example comes up, so that no letter is learnt for its place, and the router
divides none out.

It takes a while before anything is learnt. The sign is the loss: that of guessing is ln(number of domains), 1.39 for
four and 2.08 for eight, and it has to fall far below. SmolLM2-135M with ``--steps 800 --batch-size 32 --lr 1e-4``
answered 99.4 % of four domains' prompts from other sources right, and 95.0 % of eight domains'; with ``--steps 200
--lr 5e-5`` it was 65.3 % of four. With eight at 1e-4 the loss stays at 2.1 for 200 steps.

What is written is a router that ``MESwitchModelForCausalLM.from_pretrained(family, router="choice-router")`` takes:
``router_config.json``, which names the fine-tuned model in ``choice-router/model``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from transformers_meswitch import MESwitchModelForCausalLM, MultipleChoiceRouter
from transformers_meswitch.routing.data import read_prompts
from transformers_meswitch.routing.evaluation import Evaluation, evaluate
from transformers_meswitch.routing.question import Question
from transformers_meswitch.routing.texts import routed_text
from transformers_meswitch.routing.window import window_ids

_IGNORED = -100


class Questions(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Questions with their answers; options are shuffled each time, so that no letter is learnt by heart."""

    def __init__(self, tokenizer: Any, router: MultipleChoiceRouter, texts: Mapping[str, Sequence[str]], seed: int):
        self.tokenizer, self.domains = tokenizer, dict(router.domains)
        # For a data loader in this process; workers would need one each, seeded anew for each epoch.
        self.chance = random.Random(seed)
        self.rows = [
            (label, ids) for label, own in texts.items() for ids in window_ids(tokenizer, own, router.window) if ids
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        label, query = self.rows[i]
        order = list(self.domains)
        self.chance.shuffle(order)
        question = Question.of(self.tokenizer, [self.domains[name] for name in order])
        ids = [*question.ids(query), question.letters[order.index(label)]]
        return {"input_ids": ids, "labels": [_IGNORED] * (len(ids) - 1) + ids[-1:]}


def padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """One batch, padded on the right; the padding is masked, so its id does not matter."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": _IGNORED}
    batch = {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
        for key, value in fill.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {**batch, "attention_mask": (torch.arange(length) < lengths.unsqueeze(1)).long()}


def device() -> str:
    """Where to compute unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fine_tune(
    model: str,
    router: MultipleChoiceRouter,
    texts: Mapping[str, Sequence[str]],
    output: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    where: str | None = None,
) -> MultipleChoiceRouter:
    """Train a model on a router's question; the router of the model, which is in ``output / "model"``.

    Args:
        model: causal LM, Hub id or folder.
        router: with the domains and the window.
        texts: prompts of each of its experts.
        output: folder for the router.
        steps: optimiser steps, each of ``batch_size`` questions.
        batch_size: see there.
        lr: highest learning rate, reached after a tenth of the steps.
        seed: of the order of prompts and options.
        where: ``"cpu"`` or ``"cuda"``; by default an accelerator if there is one.
    """
    set_seed(seed)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
        use_cpu=(where or device()) == "cpu",
    )
    questions = Questions(tokenizer, router, texts, seed)
    Trainer(trained, settings, train_dataset=questions, data_collator=padded).train()
    folder = output / "model"
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = MultipleChoiceRouter(dict(router.domains), window=router.window, repo=str(folder), divides_prior=False)
    found.save_pretrained(output)
    return found


def measured(model: str, router: MultipleChoiceRouter, texts: Mapping[str, Sequence[str]]) -> Evaluation:
    """How well a model answers the question of a router."""
    asked = MESwitchModelForCausalLM.from_pretrained(model, experts={})
    asked.to(device()).eval()
    own = {
        label: [ids for ids in window_ids(asked.tokenizer_for(None), prompts, router.window) if ids]
        for label, prompts in texts.items()
    }
    output = router.route_ids(asked, [ids for rows in own.values() for ids in rows], router.labels)
    return evaluate(output, [label for label, rows in own.items() for _ in rows])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Fine-tune, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="causal LM to fine-tune: Hub id or folder")
    parser.add_argument("--data", action="append", required=True, help="as of meswitch route train")
    parser.add_argument("--test", action="append", default=[], help="prompts to measure on, in the same form")
    parser.add_argument(
        "--domain", action="append", required=True, metavar="EXPERT=TEXT", help="what an expert is for"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the router")
    parser.add_argument("--steps", type=int, default=200, help="200 by default; more for many domains, see above")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    domains = dict(text.split("=", 1) for text in args.domain)
    router = MultipleChoiceRouter(domains, window=args.window)
    prompts = {label: list(map(routed_text, own)) for label, own in read_prompts(args.data).items()}
    test = {label: list(map(routed_text, own)) for label, own in read_prompts(args.test).items()}
    unknown = sorted({*prompts, *test} - set(domains))
    if unknown:
        parser.error(f"argument --domain: none for {', '.join(unknown)}")

    result = {"before": measured(args.model, router, test).to_dict()} if test else {}
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
    tuned = fine_tune(args.model, router, prompts, args.output, **settings)
    if test:
        result["after"] = measured(str(tuned.repo), dataclasses.replace(tuned, repo=None), test).to_dict()
        for when, found in result.items():
            print(f"{when}: {found['accuracy']:.2%} of {found['prompts']} prompts right")
        (args.output / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
