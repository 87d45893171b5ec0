"""The demo family with a router that goes by the amount of a record, which tests may not change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from transformers_meswitch import HeadRouter, MESwitchModelForCausalLM
from transformers_meswitch.demo.runner import FAMILY
from transformers_meswitch.demo.tasks import expert_for, prompts


@pytest.fixture(scope="session")
def sorted_prompts() -> dict[str, list[str]]:
    """Records for training, by expert."""
    found: dict[str, list[str]] = {}
    for prompt in islice(prompts(held_out=False, seed=3), 400):
        found.setdefault(expert_for(prompt), []).append(prompt)
    return found


@pytest.fixture(scope="session")
def load_demo() -> Callable[[], Any]:
    return lambda: MESwitchModelForCausalLM.from_pretrained(FAMILY, router=None)


@pytest.fixture(scope="session")
def router(load_demo: Callable[[], Any], sorted_prompts: dict[str, list[str]]) -> HeadRouter:
    return HeadRouter.train(load_demo(), sorted_prompts, progress=False)


@pytest.fixture
def family(load_demo: Callable[[], Any], router: HeadRouter) -> Any:
    model = load_demo()
    model.set_router(router)
    return model


@pytest.fixture(scope="session")
def saved(load_demo: Callable[[], Any], router: HeadRouter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family repo with its router."""
    folder = tmp_path_factory.mktemp("routed-family") / "family"
    model = load_demo()
    model.set_router(router)
    model.save_pretrained(folder)
    return folder
