"""A family whose saving is cut off is the old family, the new one, or nothing that loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures_models import TinyFamily
from tests.model_state import prompt
from transformers_meswitch import MESwitchModelForCausalLM


class Cut(Exception):
    """Stands for a full disk or a killed process."""


def cut_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[int]:
    """Let the ``moment``-th file that is moved into place fail, and all later ones."""
    moved = [0]
    replace = os.replace

    def failing(*args: Any, **kwargs: Any) -> None:
        moved[0] += 1
        if moved[0] > moment:
            raise Cut
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(Path, "replace", lambda self, target: failing(self, target))
    return moved


def answers(folder: Path) -> dict[str | None, torch.Tensor] | None:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (ValueError, OSError):
        return None
    logits = {}
    for name in [None, *model.experts]:
        model.set_expert(name)
        logits[name] = model(prompt()).logits
    return logits


def same(left: dict[str | None, torch.Tensor], right: dict[str | None, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_no_moment_of_a_save_leaves_a_loadable_half(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    math, code = tiny_family.deltas["math"], tiny_family.deltas["code"]
    old = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"one": math, "two": math})
    new = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"one": math, "two": code})
    for name, family in {"old": old, "new": new}.items():
        family.save_pretrained(tmp_path / name)
    whole = [answers(tmp_path / name) for name in ("old", "new")]
    assert whole[0] is not None
    assert whole[1] is not None
    assert not same(*whole)
    outcomes = []
    for start in ("nothing", "old"):
        for moment in range(100):
            folder = tmp_path / f"{start}-{moment}"
            if start == "old":
                old.save_pretrained(folder)
            with monkeypatch.context() as patch:
                cut_at(patch, moment)
                try:
                    new.save_pretrained(folder)
                except Cut:
                    finished = False
                else:
                    finished = True
            found = answers(folder)
            assert found is None or same(found, whole[1]) or (start == "old" and same(found, whole[0])), (
                start,
                moment,
            )
            outcomes.append(found is None)
            if finished:
                assert found is not None
                break
        else:
            pytest.fail("saving never finished")
    assert any(outcomes)
    assert not all(outcomes)
