"""Saving: what a folder holds when it is cut off, what stays in it and what goes, and what is never pushed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.fixtures_models import CODE_VOCAB_SIZE, VOCAB_SIZE, TinyFamily
from tests.model_state import prompt
from tests.verification.records import evidence
from transformers_meswitch import MESwitchModelForCausalLM, saving
from transformers_meswitch.errors import UnsupportedOperationError
from transformers_meswitch.saving import save_expert
from transformers_meswitch.verification.evidence import tensors_digest, write_evidence


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
    old = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"one": math, "two": code})
    new = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"one": code, "two": math})
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


def test_an_old_family_survives_a_save_that_fails_before_the_exchange(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    math, code = tiny_family.deltas["math"], tiny_family.deltas["code"]
    old, new = (
        MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"one": one, "two": two})
        for one, two in ((math, code), (code, math))
    )
    old.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    second = iter([False, True])

    def failing(*args: Any, **kwargs: Any) -> None:
        if next(second):
            raise Cut
        save_expert(*args, **kwargs)

    monkeypatch.setattr(saving, "save_expert", failing)
    with pytest.raises(Cut):
        new.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_experts_that_are_gone_leave_the_folder_and_nothing_else_does(tiny_family: TinyFamily, tmp_path: Path) -> None:
    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))
    family.save_pretrained(tmp_path)
    inner = tmp_path / "experts"
    (inner / "code" / "evaluation.txt").write_text("mine")
    shutil.copytree(inner / "math", inner / "loose")
    card = inner / "code" / "README.md"
    card.write_text(card.read_text() + "By hand.\n")
    family.delete_adapter("math")
    family.save_pretrained(tmp_path)
    assert sorted(path.name for path in inner.iterdir()) == ["code", "loose"]
    assert (inner / "code" / "evaluation.txt").read_text() == "mine"
    assert card.read_text().endswith("By hand.\n")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).experts == ["code"]


def test_experts_can_change_names_in_the_folder_they_were_read_from(tiny_family: TinyFamily, tmp_path: Path) -> None:
    experts = dict(tiny_family.deltas)
    MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=experts).save_pretrained(tmp_path)
    inner = tmp_path / "experts"
    renamed = {"math": inner / "code", "code": inner / "math"}
    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=renamed)
    family.save_pretrained(tmp_path)
    for model in (family, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert len(model.tokenizer_for("math")) == CODE_VOCAB_SIZE
        assert len(model.tokenizer_for("code")) == VOCAB_SIZE
    assert "<add-2>" not in str(AutoModelForCausalLM.from_pretrained(tmp_path).tokenizer_for("code").chat_template)
    assert "<add-2>" not in (inner / "code" / "chat_template.jinja").read_text(), "the other expert's"


def test_names_that_no_file_system_takes(tiny_family: TinyFamily, tmp_path: Path) -> None:
    math, code = tiny_family.deltas["math"], tiny_family.deltas["code"]
    long = "\u00e9" * 80
    experts = {long: math, f"{long}x": code, "Coder": math, "coder": code}
    MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=experts).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    sizes = {name: len(again.tokenizer_for(name)) for name in again.experts}
    assert sizes == {long: VOCAB_SIZE, f"{long}x": CODE_VOCAB_SIZE, "Coder": VOCAB_SIZE, "coder": CODE_VOCAB_SIZE}
    folders = [path.name for path in (tmp_path / "experts").iterdir()]
    assert max(map(len, folders)) <= 100
    assert len({folder.lower() for folder in folders}) == len(folders) == 4


def test_arguments_are_transformers_and_no_others(tiny_family: TinyFamily, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"])
    model.save_pretrained(tmp_path, variant=None, token=None, save_original_format=False, commit_message="unused")
    with pytest.raises(TypeError, match=r"save_pretrained\(\) got an unexpected keyword argument 'nonsense'"):
        model.save_pretrained(tmp_path, nonsense=1)
    with pytest.raises(TypeError, match=r"push_to_hub\(\) got an unexpected keyword argument 'nonsense'"):
        model.push_to_hub("me/delta", nonsense=1)
    for refused in ({"variant": "fp16"}, {"save_peft_format": False}, {"distributed_checkpoint": True}):
        with pytest.raises(UnsupportedOperationError, match=next(iter(refused))):
            model.save_pretrained(tmp_path, **refused)


def test_no_route_pushes_what_is_on_this_machine_only(tiny_family: TinyFamily, tmp_path: Path) -> None:
    delta = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"])
    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))
    for model in (delta, family):
        with pytest.raises(UnsupportedOperationError, match="Push the base"):
            model.push_to_hub("me/model")
        with pytest.raises(UnsupportedOperationError, match="Push the base"):
            model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/model")
    assert delta.peft_config["default"].expert_model_name_or_path is None


EVIDENCE = "meswitch_evidence.json"


@pytest.fixture
def verified(tiny_family: TinyFamily, tmp_path: Path) -> Path:
    """A delta with the evidence of it."""
    folder = shutil.copytree(tiny_family.deltas["math"], tmp_path / "verified")
    digest = tensors_digest(load_file(folder / "adapter_model.safetensors"))
    write_evidence(folder, evidence(tensors_sha256=digest))
    return folder


def test_a_saved_delta_keeps_its_evidence(tiny_family: TinyFamily, verified: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):  # the delta's own tensors are not cast
        out = tmp_path / dtype
        AutoModelForCausalLM.from_pretrained(verified, dtype=dtype).save_pretrained(out)
        assert (out / EVIDENCE).read_bytes() == (verified / EVIDENCE).read_bytes()
        assert "## Fidelity" in (out / "README.md").read_text()
    experts = {"math": verified, "code": tiny_family.deltas["code"]}
    MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=experts).save_pretrained(tmp_path / "family")
    found = [path.relative_to(tmp_path / "family").as_posix() for path in (tmp_path / "family").rglob(EVIDENCE)]
    assert found == [f"experts/math/{EVIDENCE}"]


def test_changed_tensors_are_saved_without_it(
    verified: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(verified)
    step = next(p for name, p in model.named_parameters() if name.endswith(".step"))
    step.data[0] *= 2
    model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / EVIDENCE).exists()
    assert "## Fidelity" not in (tmp_path / "changed" / "README.md").read_text()
    assert "evidence of other tensors" in caplog.text
    (verified / EVIDENCE).write_text("{")
    AutoModelForCausalLM.from_pretrained(verified).save_pretrained(tmp_path / "malformed")
    assert not (tmp_path / "malformed" / EVIDENCE).exists()


def test_evidence_of_the_delta_that_was_there_before_goes(
    tiny_family: TinyFamily, verified: Path, tmp_path: Path
) -> None:
    family = tmp_path / "family"
    MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"a": verified}).save_pretrained(family)
    assert (family / "experts" / "a" / EVIDENCE).is_file()
    other = {"a": tiny_family.deltas["code"]}
    MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=other).save_pretrained(family)
    assert not (family / "experts" / "a" / EVIDENCE).exists()
    AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"]).save_pretrained(verified)
    assert not (verified / EVIDENCE).exists()
    assert "## Fidelity" not in (verified / "README.md").read_text()


def test_a_delta_saved_elsewhere_names_the_base_where_it_is(tiny_family: TinyFamily, tmp_path: Path) -> None:
    """In a family the base is named from the delta's own folder, which says nothing to a delta saved elsewhere."""
    moved = tmp_path / "family" / "experts" / "math"
    shutil.copytree(tiny_family.deltas["math"], moved)
    config = moved / "adapter_config.json"
    stated = json.loads(config.read_text())
    config.write_text(json.dumps({**stated, "base_model_name_or_path": "../../base"}))
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"math": moved})
    model.set_expert("math")
    expected = model(prompt()).logits
    save_expert(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(prompt()).logits, expected)
