"""The example's data: right by its own scorer, reproducible, and without a prompt in both splits."""

import itertools
import json
from decimal import Decimal

import pytest
from orders import INSTRUCTION, first_json_object, generate_orders, score_order
from tasks import TASKS, Task, prepare_data, read_split, split, split_path, write_split
from word_problems import final_number, score_word_problem


def _key(prompt):
    return " ".join(prompt.lower().split())


@pytest.fixture(params=sorted(TASKS))
def task(request):
    """Each task; the word problems need reasoning-gym."""
    if request.param == "math":
        pytest.importorskip("reasoning_gym")
    return TASKS[request.param]


def test_splits_share_no_prompt_and_are_reproducible(task):
    train, test = split(task, train=300, test=100, seed=3)
    prompts = [_key(item.prompt) for item in train + test]
    assert (len(train), len(test)) == (300, 100)
    assert len(set(prompts)) == 400
    assert split(task, train=300, test=100, seed=3) == (train, test)
    assert split(task, train=300, test=100, seed=4)[1] != test


def test_every_reference_scores_and_no_other_reference_does_by_chance(task):
    _, items = split(task, train=0, test=200, seed=0)
    assert all(task.score(item.completion, item.completion) for item in items)
    shifted = [task.score(a.completion, b.completion) for a, b in itertools.pairwise(items)]
    assert sum(shifted) <= 0.05 * len(items)
    assert not any(task.score("", item.completion) for item in items)


def test_split_drops_prompts_that_differ_in_case_and_space_only():
    pairs = [("one  x", "1"), ("One x", "1"), ("two", "2"), ("one x ", "1"), ("three", "3")]
    repeating = Task("t", lambda seed: iter(pairs), score_word_problem, 4)
    train, test = split(repeating, train=2, test=1, seed=0)
    assert [item.prompt for item in test + train] == ["one  x", "two", "three"]


def test_splits_survive_their_files(tmp_path):
    items = split(TASKS["json"], train=5, test=0, seed=0)[0]
    write_split(tmp_path / "a" / "b.jsonl", items)
    assert read_split(tmp_path / "a" / "b.jsonl") == items


def test_splits_that_exist_are_kept(tmp_path):
    """So that a machine without reasoning-gym can run on data made elsewhere."""
    kept = split(TASKS["json"], train=1, test=1, seed=9)
    for part, items in zip(("train", "test"), kept, strict=True):
        write_split(split_path(tmp_path, "math", part), items)
    prepare_data(tmp_path, train=3, test=2, seed=0)
    assert read_split(split_path(tmp_path, "math", "train")) == kept[0]
    assert len(read_split(split_path(tmp_path, "json", "train"))) == 3
    assert len(read_split(split_path(tmp_path, "json", "test"))) == 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1 + 2 = 3\n#### 3", "3"),
        ("#### 3 then more\n#### -4.50", "-4.5"),
        ("so #### $1,250", "1250"),
        ("the answer is 12. I used 3 steps", "12"),
        ("The answer is: £7", "7"),
        ("2 and 3 make 5", "5"),
    ],
)
def test_final_number_is_what_a_solution_arrives_at(text, number):
    assert final_number(text) == Decimal(number)


def test_a_wrong_or_missing_number_does_not_score():
    assert not score_word_problem("#### 41", "#### 42")
    assert not score_word_problem("I cannot say.", "#### 42")
    assert not score_word_problem("42 is close, but the answer is 24", "#### 42")


ORDER = next(generate_orders(1))[1]


def test_an_order_scores_whatever_stands_around_it_and_in_any_order_of_keys():
    fields = json.loads(ORDER)
    backwards = json.dumps(dict(reversed(fields.items())), indent=2)
    assert score_order(f"Here you are:\n```json\n{backwards}\n```", ORDER)


@pytest.mark.parametrize("field", sorted(json.loads(ORDER)))
def test_an_order_with_one_field_wrong_or_missing_does_not_score(field):
    fields = json.loads(ORDER)
    assert not score_order(json.dumps({**fields, field: "other"}), ORDER)
    del fields[field]
    assert not score_order(json.dumps(fields), ORDER)


@pytest.mark.parametrize("text", ["", "{", "no", '{"a": ', "[1]", "{" * 5000, '{"a":' * 5000])
def test_what_is_not_json_does_not_score(text):
    assert not score_order(text, ORDER)
    assert first_json_object(text) is None


def test_an_order_says_everything_its_json_holds():
    for prompt, reference in itertools.islice(generate_orders(5), 300):
        email = prompt.removeprefix(INSTRUCTION)
        order = json.loads(reference)
        assert order["customer"] in email
        assert order["reference"] in email
        assert order["coupon"] is None or order["coupon"] in email
        assert all(item["product"] in email or item["product"][:-1] in email for item in order["items"])
        assert all(item["unit_price"] in email for item in order["items"])
        assert (order["deliver_by"] is None) == ("here by" not in email)
        assert (order["express"] is None) == ("xpress" not in email and "Normal shipping" not in email)
