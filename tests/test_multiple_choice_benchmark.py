"""``benchmarks/routing/multiple_choice.py``: what it measures, on the demo family's base, and what it goes on from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.routing import multiple_choice, sources, training
from transformers_meswitch import MESwitchModelForCausalLM, MultipleChoiceRouter
from transformers_meswitch.demo.runner import FAMILY
from transformers_meswitch.routing.evaluation import evaluate
from transformers_meswitch.routing.window import window_ids

DOMAINS = {"instruction": "records", "code": "talk"}
PROMPTS = {"instruction": ["mira 2024-03-09 417", "tom 2024-01-02 5"], "code": ["who is it", "where"]}


def test_both_orders_and_the_prior_are_measured() -> None:
    model = MESwitchModelForCausalLM.from_pretrained(FAMILY / "base", experts={}).eval()
    found = multiple_choice.asked(model, DOMAINS, 32, PROMPTS)
    assert found["prompts"] == 4
    texts = [text for own in PROMPTS.values() for text in own]
    right = ["instruction"] * 2 + ["code"] * 2
    for divides, row in ((True, found), (False, found["without_prior"])):
        outputs = [
            MultipleChoiceRouter(domains, window=32, threshold=0.0, divides_prior=divides).route_ids(
                model, window_ids(model.tokenizer_for(None), texts, 32), list(domains)
            )
            for domains in (DOMAINS, dict(reversed(DOMAINS.items())))
        ]
        answers = [[out.labels[i] for i in out.probabilities.argmax(dim=1).tolist()] for out in outputs]
        assert row["accuracy"] == sum(a == b for a, b in zip(answers[0], right, strict=True)) / 4
        assert row["accuracy_reversed"] == sum(a == b for a, b in zip(answers[1], right, strict=True)) / 4
        assert row["same_reversed"] == sum(a == b for a, b in zip(*answers, strict=True)) / 4
        expected = evaluate(outputs[0], right).calibration_error
        assert row["calibration_error"] == pytest.approx(expected, abs=1e-4)
    assert found["without_prior"]["accuracy"] == found["accuracy_without_prior"]


def test_what_the_test_asks_is_not_trained_on() -> None:
    hard = sources.hard_set()[0]["prompt"]
    train = {"code": ["a", "b", hard], "instruction": ["c", "d"]}
    found = training.without_tested(train, {"code": ["c"], "instruction": ["a"]})
    assert found == {"code": ["b"], "instruction": ["d"]}


def made_up(prefix: str, domains: Any) -> dict[str, list[str]]:
    return {domain: [f"{prefix} {domain} {i}" for i in range(9)] for domain in domains}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done, instead of doing it."""
    done: list[str] = []

    def asked(model: Any, domains: Any, window: int, prompts: Any) -> dict[str, Any]:
        row = {"accuracy": 0.5, "prompts": sum(map(len, prompts.values()))}
        return row | dict.fromkeys(("accuracy_reversed", "same_reversed", "accuracy_without_prior"), 0.5)

    def fine_tune(base: str, router: Any, train: Any, folder: Path, **settings: Any) -> Any:
        done.append(f"{settings['steps']} steps")
        return MultipleChoiceRouter(dict(router.domains), repo="me/tuned")

    monkeypatch.setattr(multiple_choice, "asked", asked)
    monkeypatch.setattr(multiple_choice, "_loaded", lambda name, device: done.append(name))
    monkeypatch.setattr(multiple_choice.runpy, "run_path", lambda path: {"fine_tune": fine_tune})
    monkeypatch.setattr(multiple_choice, "check_frozen", lambda: None)
    for name, prefix in (("test_prompts", "test"), ("training_prompts", "train")):
        monkeypatch.setattr(multiple_choice, name, partial(made_up, prefix))
    return done


def test_each_step_is_kept_and_not_done_again(steps: list[str], tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    path.write_text('{"head": {"four": 1}}')
    command = ["--base", "me/base", "--asked", "4", "--steps", "7", "--output", str(path)]
    multiple_choice.main([*command, "--sets", "four"])
    assert steps == ["me/base", "7 steps", "me/tuned"]
    multiple_choice.main([*command, "--sets", "four", "eight"])
    assert steps == ["me/base", "7 steps", "me/tuned"] * 2
    result = json.loads(path.read_text())
    assert result["head"] == {"four": 1}
    assert set(result["multiple_choice"]) == {"four", "eight"}
    assert result["multiple_choice"]["eight"]["prompts"]["sql"] == {"train": 9, "test": 4}
    assert result["multiple_choice"]["four"]["before"]["prompts"] == 16

    del result["multiple_choice"]["four"]["after"]
    path.write_text(json.dumps(result))
    multiple_choice.main([*command, "--sets", "four"])
    assert steps[6:] == ["7 steps", "me/tuned"]
    multiple_choice.main([*command, "--sets", "four", "--window", "64"])
    assert steps[8:] == ["me/base", "7 steps", "me/tuned"]
