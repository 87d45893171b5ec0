"""``benchmarks/routing/end_to_end.py`` on a tiny base whose experts are noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.cells import ExpertId
from benchmarks.quality.data import write_split
from benchmarks.quality.experts import ExpertFolder
from benchmarks.quality.smoke import tiny_base
from benchmarks.routing import end_to_end
from transformers_meswitch import HeadRouter

#: Without the one that needs a package of its own.
TASKS = {name: task for name, task in end_to_end.TASKS.items() if name != "math"}


@pytest.fixture(scope="module", autouse=True)
def few_tasks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(end_to_end, "TASKS", TASKS)
        yield


@pytest.fixture(scope="module")
def family(few_tasks: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("end-to-end")
    base = ExpertFolder(tiny_base(folder / "base")).load()
    for seed, (name, task) in enumerate(TASKS.items()):
        write_split(folder / "data", task, train=40, test=12)
        torch.manual_seed(seed)
        weights = {key: value + 0.2 * torch.randn_like(value) for key, value in base.items()}
        ExpertFolder(folder / "work" / "experts" / str(ExpertId(name, "light", 0))).save(weights, {})
    return end_to_end.load_family(folder / "base", folder / "work", "light", 0, "cpu", None), folder / "data"


def compare(family: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Where an answer counts as right if it is that of the task's own expert."""
    model, data = family
    own = {}
    real = end_to_end.answers

    def answers(model: Any, items: Any, experts: Any, *sizes: int) -> list[str]:
        texts = real(model, items, experts, *sizes)
        if experts[0] != "auto":
            own.update({item.prompt: text for item, text in zip(items, texts, strict=True)})
        return texts

    monkeypatch.setattr(end_to_end, "answers", answers)
    scored = {name: replace(task, score=lambda text, item: text == own[item.prompt]) for name, task in TASKS.items()}
    monkeypatch.setattr(end_to_end, "TASKS", scored)
    return end_to_end.compare(model, data, 0, 4, batch=8, new_tokens=6)


def test_both_ways_are_compared(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(family, monkeypatch)
    assert (found["items"], found["named"]) == (12, 1.0)
    assert found["routed_right"] >= 0.75, "tasks that differ in every word"
    assert found["auto"] >= found["routed_right"], "the right expert gave another answer"
    assert set(found["tasks"]) == set(TASKS)


def test_a_router_that_errs_is_seen(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = HeadRouter.train
    shifted = dict(zip(TASKS, [*list(TASKS)[1:], next(iter(TASKS))], strict=True))
    monkeypatch.setattr(
        HeadRouter, "train", lambda model, prompts: train(model, {shifted[name]: own for name, own in prompts.items()})
    )
    found = compare(family, monkeypatch)
    assert found["routed_right"] <= 0.25
    assert found["points_lost"] > 25
