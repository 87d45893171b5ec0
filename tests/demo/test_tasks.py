"""The demo's tasks: known answers, strict scorers, a split that cannot overlap, the same prompts everywhere."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest

from transformers_meswitch.demo.tasks import TASKS, Record, is_held_out, prompts, random_record

KNOWN = [
    ("json", "mira 2024-03-09 417", '{"name":"mira","due":"2024-03-09","amount":417}'),
    ("json", "bo 1990-01-01 5", '{"name":"bo","due":"1990-01-01","amount":5}'),
    ("letter", "mira 2024-03-09 417", "Mira owes 417 by 9 March 2024."),
    ("letter", "ulopizek 2039-12-31 9999", "Ulopizek owes 9999 by 31 December 2039."),
    ("redact", "mira 2024-03-09 417", "m*** 2024 417"),
    ("redact", "bo 1990-01-01 5", "b* 1990 5"),
]

#: The first held-out prompts of seed 7.
FROZEN = ["du 2021-06-01 448", "ivutadid 2024-08-11 5662", "po 1997-03-24 473"]


@pytest.mark.parametrize(("task", "prompt", "answer"), KNOWN)
def test_known_answers_are_right(task: str, prompt: str, answer: str) -> None:
    assert TASKS[task].answer(prompt) == answer
    assert TASKS[task].is_right(prompt, answer)


@pytest.mark.parametrize(("task", "prompt", "answer"), KNOWN)
def test_anything_else_is_wrong(task: str, prompt: str, answer: str) -> None:
    for wrong in ("", prompt, answer + " ", " " + answer, answer[:-1], answer.swapcase(), answer + answer):
        assert not TASKS[task].is_right(prompt, wrong)


def test_no_two_tasks_share_an_answer() -> None:
    for prompt in islice(prompts(held_out=True, seed=3), 200):
        answers = {task.answer(prompt) for task in TASKS.values()} | {prompt}
        assert len(answers) == len(TASKS) + 1


def test_json_answers_parse_to_the_record() -> None:
    for prompt in islice(prompts(held_out=False, seed=4), 50):
        record = Record.parse(prompt)
        assert json.loads(TASKS["json"].answer(prompt)) == {
            "name": record.name,
            "due": record.due.isoformat(),
            "amount": record.amount,
        }


def test_prompts_round_trip() -> None:
    rng = random.Random(5)
    for _ in range(200):
        record = random_record(rng)
        assert Record.parse(record.prompt) == record
        assert 2 <= len(record.name) <= 8
        assert record.name.isalpha()
        assert record.name.islower()
        assert 1 <= record.amount <= 9999


@pytest.mark.parametrize("prompt", ["", "mira", "mira 2024-13-09 417", "mira 2024-03-09 x", "mira  2024-03-09 417"])
def test_what_is_not_a_record_is_named(prompt: str) -> None:
    with pytest.raises(ValueError, match="is not a record"):
        Record.parse(prompt)


def test_splits_are_disjoint_and_a_tenth_is_held_out() -> None:
    train = set(islice(prompts(held_out=False, seed=0), 5000))
    test = set(islice(prompts(held_out=True, seed=0), 500)) | set(islice(prompts(held_out=True, seed=1), 500))
    assert not train & test
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, test))
    rng = random.Random(6)
    share = sum(is_held_out(random_record(rng).prompt) for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_prompts_are_the_same_on_every_run() -> None:
    """Frozen: another order or split would change the numbers that the documentation reports."""
    assert list(islice(prompts(held_out=True, seed=7), 3)) == FROZEN
    assert list(islice(prompts(held_out=True, seed=8), 3)) != FROZEN
