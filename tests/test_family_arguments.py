"""Arguments of the family loader that transformers' own ``from_pretrained`` takes, and families without a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.fixtures_models import TinyFamily
from tests.model_state import prompt
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.errors import ExpertNotFoundError


def load(tiny_family: TinyFamily, **kwargs: Any) -> Any:
    return MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas), **kwargs)


def logits(model: Any, expert: str) -> torch.Tensor:
    model.set_expert(expert)
    with torch.no_grad():
        return model(prompt()).logits


def test_a_config_for_the_base(tiny_family: TinyFamily, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_family.base, attn_implementation="eager")
    model = load(tiny_family, config=config)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, "code"), logits(load(tiny_family, attn_implementation="eager"), "code"))
    model.save_pretrained(tmp_path)
    again = MESwitchModelForCausalLM.from_pretrained(
        tmp_path, config=AutoConfig.from_pretrained(tiny_family.base, attn_implementation="eager")
    )
    assert again.config._attn_implementation == "eager"
    assert model.tokenizer_for(None).vocab_size == again.tokenizer_for(None).vocab_size


def test_loading_info_of_the_base_comes_along(tiny_family: TinyFamily, tmp_path: Path) -> None:
    model, info = load(tiny_family, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.experts == ["math", "code"]
    model.save_pretrained(tmp_path)
    for loader in (MESwitchModelForCausalLM, AutoModelForCausalLM):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert sorted(again.experts) == ["code", "math"]


def test_a_family_without_a_head_is_saved_whole(tiny_family: TinyFamily, tmp_path: Path) -> None:
    load(tiny_family).save_pretrained(tmp_path / "one")
    AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for expert in ("math", "code"):
        assert torch.equal(logits(one, expert), logits(two, expert))


def test_generation_defaults_that_were_edited_are_saved_with_the_expert(
    tiny_family: TinyFamily, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"])
    model.save_pretrained(tmp_path / "as-it-was")
    stored = (tiny_family.deltas["code"] / "generation_config.json").read_bytes()
    assert (tmp_path / "as-it-was" / "generation_config.json").read_bytes() == stored
    model.generation_config.max_new_tokens = 17
    model.generation_config.expert = "default"
    model.save_pretrained(tmp_path / "edited")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert again.generation_config.max_new_tokens == 17
    assert not hasattr(again.generation_config, "expert")
    # The defaults of a model that was not loaded from an expert are the base's, and no expert's.
    family = load(tiny_family)
    family.generation_config.max_new_tokens = 23
    family.save_pretrained(tmp_path / "family")
    assert b"23" not in (tmp_path / "family/experts/code/generation_config.json").read_bytes()


def test_what_is_chosen_is_saved_while_adapters_are_disabled(tiny_family: TinyFamily, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"])
    model.disable_adapters()
    assert model.active_adapters() == ["default"]
    assert model.get_adapter_state_dict()
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).active_expert == "default"


def test_a_family_is_not_saved_with_a_default_that_it_has_not(tiny_family: TinyFamily, tmp_path: Path) -> None:
    model = load(tiny_family)
    model.generation_config.expert = "math"
    model.delete_adapter("math")
    with pytest.raises(ExpertNotFoundError, match=r"generation_config\.expert.*'math'"):
        model.save_pretrained(tmp_path / "family")
    assert not (tmp_path / "family").exists()
    model.generation_config.expert = ["code", None]
    model.save_pretrained(tmp_path / "family")
