"""``meswitch demo``: load the bundled family on a CPU, ask every expert, score them all, count the bytes."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..errors import MESwitchError
from ..plain_table import plain_table
from .tasks import TASKS, expert_for, prompts

__all__ = ["FAMILY", "DemoAssetsError", "run_demo"]

#: The family repo inside the package.
FAMILY = Path(__file__).parent / "assets" / "family"
#: How the base is called in tables and in the result; among expert names it is reserved.
BASE = "base"

_BATCH_SIZE = 50
_MAX_NEW_TOKENS = 64
_HELD_OUT_SEED = 7
#: A prompt like none that the router knows.
_NO_RECORD = "hello, who are you?"


class DemoAssetsError(MESwitchError, FileNotFoundError):
    """The bundled family is not where it should be."""


def run_demo(json: bool = False, limit: int = 100, family: str | Path = FAMILY) -> dict[str, Any]:
    """Run the demo on the CPU, offline, and print it.

    Args:
        json: print the result as one JSON object instead of as tables.
        limit: held-out prompts that every expert and the base answer, at least 1; all are scored on every task.
        family: folder of the family repo.

    Returns:
        What was printed: ``examples``, ``exact_match`` (``{"base" or expert: {task: share of 1}}``), ``mixed_batch``,
        ``routed`` (``prompts`` that the router sends on, and ``right``, the share of held-out prompts that it sends
        where they belong), ``bytes`` and ``seconds``.

    Raises:
        DemoAssetsError: the family is missing; the message names the script that trains it.
        ValueError: ``limit`` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1 held-out prompt.")
    threads = torch.get_num_threads()
    # The matrices are so small that handing them to several threads costs more than it saves.
    torch.set_num_threads(1)
    try:
        result = _measure(limit, Path(family))
    finally:
        torch.set_num_threads(threads)
    print(json_module.dumps(result, indent=2) if json else _render(result))
    return result


def _measure(limit: int, family: Path) -> dict[str, Any]:
    started = time.perf_counter()
    asker = _Asker(family)
    loaded = time.perf_counter()

    held_out = list(islice(prompts(held_out=True, seed=_HELD_OUT_SEED), limit))
    everyone: list[str | None] = [None, *TASKS]
    answers = {expert or BASE: asker.ask(held_out, [expert] * limit) for expert in everyone}
    result: dict[str, Any] = {
        "held_out_prompts": limit,
        "exact_match": {
            who: {task.name: sum(map(task.is_right, held_out, given)) / limit for task in TASKS.values()}
            for who, given in answers.items()
        },
        "examples": [
            {"prompt": prompt, "expert": expert, "answers": {who: given[i] for who, given in answers.items()}}
            for i, (prompt, expert) in enumerate(zip(held_out, TASKS, strict=False))
        ],
        "mixed_batch": _mixed_batch(asker, held_out, answers),
        "routed": _routed(asker, held_out),
        "bytes": _count_bytes(family),
    }
    result["seconds"] = {
        "load": round(loaded - started, 2),
        "total": round(time.perf_counter() - started, 2),
    }
    return result


class _Asker:
    """The family, asked for whole answers."""

    def __init__(self, family: Path) -> None:
        if not (family / "config.json").is_file():
            raise DemoAssetsError(
                f"The demo family is not in {family} (no config.json there). Train it in a checkout of the "
                f"repository: python examples/train_demo_family.py --output build/demo --family {family}"
            )
        import torch

        from transformers_meswitch import MESwitchModelForCausalLM

        self.model = MESwitchModelForCausalLM.from_pretrained(family, dtype=torch.float32)
        self.tokenizers = {expert: self.model.tokenizer_for(expert) for expert in (None, *TASKS)}

    def ask(self, asked: Sequence[str], experts: Sequence[str | None]) -> list[str]:
        """Greedy answers, one row a prompt; prompt i goes to expert i, written in that expert's own chat template."""
        import torch

        answers: list[str] = []
        for start in range(0, len(asked), _BATCH_SIZE):
            chosen = list(experts[start : start + _BATCH_SIZE])
            rows = [
                self.tokenizers[expert].apply_chat_template(
                    [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
                )
                for prompt, expert in zip(asked[start : start + _BATCH_SIZE], chosen, strict=True)
            ]
            # Every tokenizer of the family pads with the base's padding token.
            inputs = self.tokenizers[None].pad(
                {"input_ids": [row["input_ids"] for row in rows]}, padding_side="left", return_tensors="pt"
            )
            with torch.inference_mode():
                tokens = self.model.generate(**inputs, expert=chosen, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            answers += [
                self.tokenizers[expert].decode(row, skip_special_tokens=True)
                for row, expert in zip(new, chosen, strict=True)
            ]
        return answers


def _mixed_batch(asker: _Asker, held_out: list[str], answers: dict[str, list[str]]) -> list[dict[str, Any]]:
    """One batch in which neighbouring rows ask different experts, the same prompts for all of them."""
    shown = held_out[:2]
    asked = [prompt for prompt in shown for _ in range(len(TASKS) + 1)]
    experts: list[str | None] = [*TASKS, None] * len(shown)
    return [
        {
            "prompt": prompt,
            "expert": expert or BASE,
            "answer": answer,
            "right": TASKS[expert].is_right(prompt, answer) if expert else None,
            "same_as_unmixed": answer == answers[expert or BASE][held_out.index(prompt)],
        }
        for prompt, expert, answer in zip(asked, experts, asker.ask(asked, experts), strict=True)
    ]


def _routed(asker: _Asker, held_out: list[str]) -> dict[str, Any]:
    """One held-out prompt for each expert and one that is no record, sent where the router says."""
    picked = asker.model.route(held_out).experts
    first = {expert_for(prompt): prompt for prompt in reversed(held_out)}
    shown = [*(first[expert] for expert in TASKS if expert in first), _NO_RECORD]
    output = asker.model.route(shown)
    return {
        "right": sum(a == expert_for(p) for a, p in zip(picked, held_out, strict=True)) / len(held_out),
        "prompts": [
            {"prompt": prompt, "expert": expert or BASE, "abstained": abstained, "probability": p, "answer": answer}
            for prompt, expert, abstained, p, answer in zip(
                shown,
                output.experts,
                output.abstained.tolist(),
                output.confidence,
                asker.ask(shown, output.experts),
                strict=True,
            )
        ],
    }


def _count_bytes(family: Path) -> dict[str, Any]:
    """Bytes as ``benchmarks.size`` counts them: a full copy of each expert against the base, once, and the deltas.

    Full copies and the base are 2 bytes a parameter; a delta is every byte of its weights' file and configuration.
    """
    from transformers import AutoConfig

    from ..compression.sources import meta_model
    from ..inspection import dense_bytes, inspect_delta

    base = dense_bytes(meta_model(AutoConfig.from_pretrained(family / "base")))
    counted = {name: inspect_delta(family / "experts" / name, base=str(family / "base")) for name in TASKS}
    deltas = {name: delta.total_bytes for name, delta in counted.items()}
    full_copies = {name: delta.dense_bytes for name, delta in counted.items()}
    stored, full = base + sum(deltas.values()), sum(size for size in full_copies.values() if size is not None)
    return {
        "base": base,
        "deltas": deltas,
        "stored": stored,
        "full_copies": full_copies,
        "ratio": full / stored,
        "all_files": sum(file.stat().st_size for file in family.rglob("*") if file.is_file()),
    }


def _render(result: dict[str, Any]) -> str:
    """The whole printout."""
    blocks = ["One base, three experts. Every prompt is a record; the expert asked decides what becomes of it:"]
    blocks.append("\n".join(f"  {task.name:8}{task.description}" for task in TASKS.values()))

    for example in result["examples"]:
        prompt, asked = example["prompt"], example["expert"]
        rows = [
            [("> " if who == asked else "  ") + who, answer, "right" if TASKS[asked].is_right(prompt, answer) else ""]
            for who, answer in example["answers"].items()
        ]
        blocks.append(
            f"Prompt: {prompt}    expert asked: {asked}\n" + plain_table(["who", "answer", asked], rows, indent="  ")
        )

    scores = [[who, *(f"{share:.0%}" for share in by_task.values())] for who, by_task in result["exact_match"].items()]
    blocks.append(
        f"Exact match on {result['held_out_prompts']} held-out prompts (deltas of 2 bits):\n"
        + plain_table(["who \\ task", *TASKS], scores, right=True, indent="  ")
    )

    rows = [
        [row["prompt"], row["expert"], row["answer"], {True: "right", False: "wrong", None: "-"}[row["right"]]]
        for row in result["mixed_batch"]
    ]
    agree = sum(row["same_as_unmixed"] for row in result["mixed_batch"])
    blocks.append(
        f"One batch, an expert a row ({agree} of {len(rows)} rows answered as when everyone asks the same expert):\n"
        + plain_table(["prompt", "expert", "answer", ""], rows, indent="  ")
    )

    routed = result["routed"]
    rows = [
        [
            row["prompt"],
            f"{row['expert']} (abstained)" if row["abstained"] else f"{row['expert']} ({row['probability']:.0%})",
            row["answer"],
        ]
        for row in routed["prompts"]
    ]
    blocks.append(
        "Nobody named: the router reads the prompt. It has learnt from examples that one-digit amounts are redacted,\n"
        f"four-digit ones become JSON and the rest letters ({routed['right']:.0%} of the held-out prompts go there);\n"
        "what is no record it leaves to the base:\n" + plain_table(["prompt", "picked", "answer"], rows, indent="  ")
    )

    size = result["bytes"]
    full = size["full_copies"]
    kept = [["base", f"{size['base']:,}", "-"]]
    kept += [[f"expert {name}", f"{delta:,}", f"{full[name]:,}"] for name, delta in size["deltas"].items()]
    kept.append(["all", f"{size['stored']:,}", f"{sum(full.values()):,}"])
    blocks.append(
        f"Bytes kept, {size['ratio']:.2f} times fewer than a full copy of each expert in 16 bit "
        f"(with tokenizers and cards the family is {size['all_files']:,} bytes):\n"
        + plain_table(["", "base + deltas", "full copies"], kept, right=True, indent="  ")
    )
    seconds = result["seconds"]
    blocks.append(f"{seconds['total']:.1f} s in all, of which loading {seconds['load']:.1f} s.")
    return "\n\n".join(blocks)
