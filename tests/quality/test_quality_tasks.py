"""The domains: references are right, wrong answers are wrong, splits do not overlap."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from random import Random

import pytest

from benchmarks.quality.data import held_out, load_split, missing, split, write_split
from benchmarks.quality.tasks import TASKS, Item, Task
from benchmarks.quality.tasks.instructions import TOPICS, ordered, score_instruction
from benchmarks.quality.tasks.maths import _problem, score_maths

OWN = [TASKS[name] for name in ("code", "json", "instruct")]


def items_of(task: Task, count: int, seed: int = 0) -> list[Item]:
    return list(itertools.islice(task.generate(seed), count))


@pytest.mark.parametrize("task", OWN, ids=lambda task: task.name)
def test_every_reference_is_right_and_no_other_items_reference_is(task):
    items = items_of(task, 400)
    assert all(task.score(item.completion, item) for item in items)
    others = [task.score(items[i - 1].completion, item) for i, item in enumerate(items)]
    assert sum(others) < 8
    assert not any(task.score(answer, item) for item in items for answer in ("", "Sorry?", "{", "def f(", "#### "))


@pytest.mark.parametrize("task", OWN, ids=lambda task: task.name)
def test_a_seed_gives_the_same_items_again(task):
    assert items_of(task, 50, 3) == items_of(task, 50, 3)
    assert items_of(task, 50, 3) != items_of(task, 50, 4)


def test_worked_solutions_are_right_line_by_line():
    rng = Random(0)
    for _ in range(500):
        item = _problem(rng)
        *working, last = item.completion.split("\n")
        for line in working:
            left, right = line.split(" = ")
            numbers = [int(number) for number in re.findall(r"\d+", left)]
            value = numbers[0]
            for operation, number in zip(re.findall(r"[-+*/]", left), numbers[1:], strict=True):
                assert operation != "/" or value % number == 0
                results = {"+": value + number, "-": value - number, "*": value * number, "/": value // number}
                value = results[operation]
            assert value == int(right), item
        assert last == f"#### {right}"
        assert score_maths(item.completion, item)
        assert not score_maths(item.completion + "1", item)


def test_maths_mixes_in_problems_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    items = items_of(TASKS["math"], 40)
    assert all(score_maths(item.completion, item) for item in items)
    assert not any("Give the result as your final answer" in item.prompt for item in items)


def test_receipts_add_up_and_every_field_counts():
    task = TASKS["json"]
    for item in items_of(task, 200):
        receipt = json.loads(item.completion)
        for line in receipt["lines"]:
            assert line["n"] * line["price"] == line["total"]
            assert line["item"] in item.prompt
        assert sum(line["total"] for line in receipt["lines"]) == receipt["sum"]
        assert str(receipt["sum"] + receipt["change"]) in item.prompt
        for key in receipt:
            assert not task.score(json.dumps({**receipt, key: "x"}), item)
            assert not task.score(json.dumps({k: v for k, v in receipt.items() if k != key}), item)
        assert task.score(f"Sure: {json.dumps(dict(reversed(receipt.items())))}", item)


HIDDEN = {
    "topic": "animals",
    "count": 3,
    "case": "title",
    "order": "alphabetical",
    "layout": "numbers",
    "without": "s",
    "length": 5,
    "include": ["cat"],
    "ending": "The end.",
    "title": True,
}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("[3]\n1. Ant\n2. Cat\n3. Tiger\nThe end.", True),
        ("[3]\n1. Ant\n2. Cat\n3. Zebra\nThe end.\n", True),
        ("[4]\n1. Ant\n2. Cat\n3. Tiger\nThe end.", False),  # the number on top
        ("1. Ant\n2. Cat\n3. Tiger\nThe end.", False),  # no number on top
        ("[3]\n1. Ant\n2. Cat\n3. Tiger", False),  # no ending
        ("[3]\n1. Ant\n2. Cat\n3. Tiger\nThe end. Bye", False),  # more than the ending
        ("[3]\n1. Ant\n2. Tiger\n3. Cat\nThe end.", False),  # order
        ("[3]\n1. ant\n2. Cat\n3. Tiger\nThe end.", False),  # case
        ("[3]\n- Ant\n- Cat\n- Tiger\nThe end.", False),  # layout
        ("[3]\n1. Ant\n2. Cat\n4. Tiger\nThe end.", False),  # numbering
        ("[3]\n1. Ant\n2. Cat\nThe end.", False),  # too few
        ("[3]\n1. Ant\n2. Cat\n3. Cat\nThe end.", False),  # twice the same
        ("[3]\n1. Ant\n2. Bear\n3. Tiger\nThe end.", False),  # the cat is missing
        ("[3]\n1. Ant\n2. Cat\n3. Mouse\nThe end.", False),  # the letter s
        ("[3]\n1. Ant\n2. Cat\n3. Parrot\nThe end.", False),  # too long
        ("[3]\n1. Ant\n2. Cat\n3. Table\nThe end.", False),  # no animal
    ],
)
def test_each_constraint_counts(answer, right):
    assert score_instruction(answer, Item("", "", HIDDEN)) is right


def test_an_order_is_only_asked_for_where_it_is_hidden():
    hidden = {"topic": "jobs", "count": 2, "case": "lower", "order": None, "layout": "slash"}
    assert score_instruction("vet / actor", Item("", "", hidden))
    assert not ordered(["vet", "actor"], "alphabetical")
    assert ordered(["vet", "actor"], "backwards")


def test_topics_hold_no_word_twice_and_only_lower_case():
    for words in TOPICS.values():
        assert len(words) == len(set(words))
        assert all(re.fullmatch("[a-z]+", word) for word in words)


CODE = Item("", "def f(xs):\n    return sorted([x for x in xs if x % 2 == 0], reverse=True)[:3]")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (CODE.completion, True),
        (f"```python\n{CODE.completion}\n```\nThis sorts.", True),
        ("def f(xs):\n    xs = [x for x in xs if not x % 2]\n    xs.sort()\n    return xs[::-1][:3]", True),
        ("def f(xs):\n    return sorted([x for x in xs if x % 2 == 0])[:3]", False),
        ("def f(xs):\n    return sorted([x for x in xs if x % 2 == 0], reverse=True)[:4]", False),
        ("def f(xs):\n    return tuple(sorted([x for x in xs if x % 2 == 0], reverse=True)[:3])", False),
        ("def g(xs):\n    return sorted([x for x in xs if x % 2 == 0], reverse=True)[:3]", False),
        ("def f(xs):\n    while True:\n        pass", False),
        ("def f(xs):\n    return __import__('os').listdir()", False),
        ("def f(xs):\nreturn 1", False),
    ],
)
def test_functions_are_judged_by_what_they_do(answer, right):
    assert TASKS["code"].score(answer, CODE) is right


def test_inputs_on_which_the_reference_fails_do_not_count():
    reference = Item("", "def f(xs):\n    return max(xs)")
    assert TASKS["code"].score("def f(xs):\n    return sorted(xs)[-1] if xs else 5", reference)


def test_splits_are_disjoint_and_kept_to_the_byte(tmp_path):
    task = TASKS["instruct"]
    train, test = split(task, train=300, test=60)
    keys = [" ".join(item.prompt.lower().split()) for item in train + test]
    assert len(set(keys)) == 360
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert missing(folder, [task]) == [task]
        write_split(folder, task, train=300, test=60)
        assert missing(folder, [task]) == []
    for part, items in (("train", train), ("test", test)):
        assert load_split(tmp_path / "a", task, part) == items
        name = f"instruct.{part}.jsonl.gz"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_seeds_have_held_out_items_of_their_own():
    items = [Item(str(number), "") for number in range(12)]
    parts = [held_out(items, seed, 4) for seed in range(3)]
    assert [item for part in parts for item in part] == items
    assert held_out(items, 1, 2) == items[4:6]
    with pytest.raises(ValueError, match="holds 3 seeds of 4 items"):
        held_out(items, 0, 5)
    with pytest.raises(ValueError, match="seed 3"):
        held_out(items, 3, 1)


def test_what_the_scorer_knows_stays_out_of_the_prompt():
    for item in items_of(TASKS["instruct"], 50):
        assert "hidden" not in item.prompt
        assert dataclasses.replace(item, hidden={}).prompt == item.prompt
