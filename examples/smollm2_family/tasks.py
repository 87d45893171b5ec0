"""The two tasks the experts are fine-tuned on: what they hold, how an answer is scored, how the data is split."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orders import generate_orders, score_order
from word_problems import generate_word_problems, score_word_problem

#: No system prompt, and an answer ends in the expert's own token instead of the base's <|im_end|>.
_JSON_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|end_json|>' if message['role'] == 'assistant' else '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Task:
    """One expert's task.

    Attributes:
        name: the expert's name in the family.
        generate: seed to endless (prompt, completion) pairs.
        score: (answer, reference completion) to whether the answer is right.
        max_new_tokens: room for the longest answer.
        end_token: a token the expert adds to the vocabulary to end its answers with; `None`: the base's.
        chat_template: the expert's own chat template; `None`: the base's.
    """

    name: str
    generate: Callable[[int], Iterator[tuple[str, str]]]
    score: Callable[[str, str], bool]
    max_new_tokens: int
    end_token: str | None = None
    chat_template: str | None = None


TASKS = {
    "math": Task("math", generate_word_problems, score_word_problem, max_new_tokens=272),
    "json": Task("json", generate_orders, score_order, 160, "<|end_json|>", _JSON_CHAT_TEMPLATE),
}


@dataclass(frozen=True)
class Item:
    """A prompt (the user's turn, without chat markup) and the completion that answers it."""

    prompt: str
    completion: str


def split(task: Task, *, train: int, test: int, seed: int) -> tuple[list[Item], list[Item]]:
    """``train`` and ``test`` items of a task, no prompt twice in either or both; the held-out ones are drawn first.

    Prompts are the same when they differ in case and white space only. Both splits come from the same generator: the
    held-out items have new numbers, names and combinations, not new kinds of problem.
    """
    seen: set[str] = set()
    items: list[Item] = []
    for prompt, completion in task.generate(seed):
        key = " ".join(prompt.lower().split())
        if key not in seen:
            seen.add(key)
            items.append(Item(prompt, completion))
        if len(items) == train + test:
            break
    return items[test:], items[:test]


def split_path(folder: Path, task: str, part: str) -> Path:
    """Where a split is kept: ``part`` is ``"train"`` or ``"test"``."""
    return folder / f"{task}.{part}.jsonl"


def write_split(path: Path, items: list[Item]) -> None:
    """Write items as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": item.prompt, "completion": item.completion}, ensure_ascii=False) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_split(path: Path) -> list[Item]:
    """Read items that :func:`write_split` wrote."""
    return [Item(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare_data(folder: Path, *, train: int, test: int, seed: int) -> None:
    """Write both splits of every task that ``folder`` does not hold yet."""
    for task in TASKS.values():
        paths = [split_path(folder, task.name, part) for part in ("train", "test")]
        if not all(path.exists() for path in paths):
            for path, items in zip(paths, split(task, train=train, test=test, seed=seed), strict=True):
                write_split(path, items)


def main() -> None:
    """Command line: ``python tasks.py --output DIR``; needs ``reasoning-gym``, unlike everything after it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prepare_data(arguments.output, train=arguments.train, test=arguments.test, seed=arguments.seed)
    for path in sorted(arguments.output.glob("*.jsonl")):
        print(f"{path}: {len(read_split(path))} items, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
