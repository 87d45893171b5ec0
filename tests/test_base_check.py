"""An expert runs over no other base than its own, wherever and however that was fetched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.fixtures_models import VOCAB_SIZE, TinyFamily
from tests.model_state import ModelState
from tests.test_bad_input import CONFIG, UP, in_config
from transformers_meswitch import MESwitchFamilyConfig, MESwitchModelForCausalLM
from transformers_meswitch.errors import BaseMismatchError


def altered_base(base: Path, copy: Path) -> Path:
    """The base with one weight of another value, in a folder of its own."""
    shutil.copytree(base, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{UP}.weight"][5, 6] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def enter(cache: Path, repo: str, folder: Path, subfolder: str = "", branch: str = "main") -> None:
    """Put a folder into a Hub cache, as if it had been downloaded."""
    entry = cache / f"models--{repo.replace('/', '--')}"
    commit = hashlib.sha1(f"{repo} {branch}".encode()).hexdigest()
    shutil.copytree(folder, entry / "snapshots" / commit / subfolder, dirs_exist_ok=True)
    (entry / "refs").mkdir(exist_ok=True)
    (entry / "refs" / branch).write_text(commit)


def test_a_base_that_differs_in_one_weight_is_named(tiny_family: TinyFamily, tmp_path: Path) -> None:
    base = altered_base(tiny_family.base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    before = ModelState(model)
    digest = json.loads((tiny_family.deltas["math"] / CONFIG).read_text())["base_fingerprint"]["tensors"]
    for load in (
        lambda: model.load_adapter(str(tiny_family.deltas["math"])),
        lambda: PeftModel.from_pretrained(model, tiny_family.deltas["math"]),
        lambda: MESwitchModelForCausalLM.from_pretrained(base, experts={"math": tiny_family.deltas["math"]}),
    ):
        with pytest.raises(BaseMismatchError, match=rf"{UP}\.weight[\s\S]*{digest[f'{UP}.weight']}"):
            load()
    before.assert_unchanged(model)


def test_a_base_built_in_memory_gets_a_warning_and_a_shape_check(tiny_family: TinyFamily) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_family.base).config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config)
    with pytest.warns(UserWarning, match="only shapes were checked"):
        model.load_adapter(str(tiny_family.deltas["math"]))
    narrow = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), "intermediate_size": 32}))
    before = ModelState(narrow)
    with pytest.raises(BaseMismatchError, match=r"mlp.*128.*32"):
        narrow.load_adapter(str(tiny_family.deltas["math"]))
    before.assert_unchanged(narrow)


@pytest.mark.parametrize("altered", [False, True], ids=["the delta's base", "another base"])
@pytest.mark.parametrize(
    "route", ["from_pretrained", "adapter_kwargs", "load_adapter", "PEFT", "family", "family in one repo", "branch"]
)
@pytest.mark.filterwarnings("error:The base:UserWarning")
def test_the_base_is_compared_wherever_it_was_fetched_to(
    route: str, altered: bool, tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = altered_base(tiny_family.base, tmp_path / "base") if altered else tiny_family.base
    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    in_config(lambda c: c.update(base_model_name_or_path="me/base"))(delta)
    cache, family = tmp_path / "cache", tmp_path / "family"
    MESwitchFamilyConfig("./base", experts={"math": "./math"}).save_pretrained(family)
    enter(cache, "me/base", tiny_family.base if route == "branch" else base)
    enter(cache, "me/base", base, branch="other")
    enter(cache, "me/delta", delta)
    for folder, inside in ((family, ""), (base, "base"), (delta, "math")):
        enter(cache, "me/family", folder, inside)
    enter(cache, "me/family", delta, "math", branch="v7")
    there: dict[str, Any] = {"cache_dir": str(cache), "local_files_only": True}

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained("me/base", **there)

    routes: dict[str, Callable[[], Any]] = {
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained("me/delta", adapter_kwargs=there, **there),
        "adapter_kwargs": lambda: AutoModelForCausalLM.from_pretrained(
            "me/family", adapter_kwargs={**there, "subfolder": "math", "revision": "v7"}, **there
        ),
        "load_adapter": lambda: plain().load_adapter("me/delta", adapter_kwargs=there),
        "PEFT": lambda: PeftModel.from_pretrained(plain(), str(delta), cache_dir=str(cache)),
        "family": lambda: MESwitchModelForCausalLM.from_pretrained("me/base", experts={"math": delta}, **there),
        "family in one repo": lambda: AutoModelForCausalLM.from_pretrained("me/family", **there),
        "branch": lambda: MESwitchModelForCausalLM.from_pretrained(
            "me/base", experts={"math": delta}, revision="other", **there
        ),
    }
    if altered:
        with pytest.raises(BaseMismatchError, match=rf"{UP}\.weight"):
            routes[route]()
    else:
        model = routes[route]()
        if hasattr(model, "tokenizer_for") and route != "PEFT":
            assert len(model.tokenizer_for(None)) == VOCAB_SIZE


def test_a_base_of_unknown_revision_may_be_the_one_that_the_delta_names(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    enter(tmp_path / "cache", "me/base", altered_base(tiny_family.base, tmp_path / "base"))
    enter(tmp_path / "cache", "me/base", tiny_family.base, branch="v1")
    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    in_config(lambda c: c.update(base_model_name_or_path="me/base", revision="v1"))(delta)
    there: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained("me/base", revision="v1", **there)
    model.load_adapter(str(delta), adapter_kwargs=there)
    with pytest.raises(BaseMismatchError, match=rf"{UP}\.weight"):
        AutoModelForCausalLM.from_pretrained(str(delta), **there)
