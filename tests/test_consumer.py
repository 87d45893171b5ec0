"""The stock transformers calls on a delta repo, each against base + delta worked out from the files by plain torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, LlamaModel

import transformers_meswitch as meswitch
from tests.fixtures_models import BASE_EOS, CODE_EOS, CODE_VOCAB_SIZE, VOCAB_SIZE, TinyFamily, dense_model
from tests.model_state import ATOL, ModelState, generated, prompt
from transformers_meswitch.errors import BaseMismatchError, DeltaFormatError, UnsupportedOperationError

WEIGHTS = "adapter_model.safetensors"
NAMES = ("math", "code")


@pytest.mark.parametrize("family_fixture", ["tiny_family", "untied_family"])
@pytest.mark.parametrize("name", NAMES)
def test_a_delta_loads_as_the_whole_expert(name: str, family_fixture: str, request: pytest.FixtureRequest) -> None:
    family: TinyFamily = request.getfixturevalue(family_fixture)
    model = AutoModelForCausalLM.from_pretrained(family.deltas[name])
    expected = dense_model(family.base, family.deltas[name])
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    x = prompt(rows=2)
    torch.testing.assert_close(model(x).logits, expected(x).logits, atol=ATOL, rtol=0)
    assert model(x).logits.shape[-1] == (CODE_VOCAB_SIZE if name == "code" else VOCAB_SIZE)
    assert generated(model) == generated(expected)
    assert model.active_adapters() == ["default"]


def test_the_comparison_would_notice_another_expert_and_one_changed_step_size(
    tiny_family: TinyFamily, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"])
    wrong = dense_model(tiny_family.base, tiny_family.deltas["code"])
    x = prompt()
    assert (model(x).logits - wrong(x).logits[..., :VOCAB_SIZE]).abs().max() > 100 * ATOL
    altered = edited(tiny_family.deltas["math"], tmp_path / "delta")
    tensors = load_file(altered / WEIGHTS)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.meswitch_delta.step"][3] *= 1.5
    save_file(tensors, altered / WEIGHTS)
    assert (model(x).logits - dense_model(tiny_family.base, altered)(x).logits).abs().max() > 2 * ATOL


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1, "salient_channels": 0},
        {"bits": 2, "salient_channels": 5, "column_steps": True},
        {"bits": 3, "salient_channels": 64},
        {"bits": 2, "salient_channels": 3, "layer_bits": {r"layers\.0\.": 3, r"down_proj": 1}},
    ],
    ids=str,
)
def test_every_kind_of_code_runs_as_written(tiny_family: TinyFamily, tmp_path: Path, options: dict[str, Any]) -> None:
    how = meswitch.MESwitchConfig(**options)
    meswitch.compress(tiny_family.base, tiny_family.experts["code"], tmp_path, how, calibration=None, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    twin = dense_model(tiny_family.base, tmp_path)
    torch.testing.assert_close(model(prompt()).logits, twin(prompt()).logits, atol=ATOL, rtol=0)
    plain = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(plain(prompt()).logits, twin(prompt()).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_headless_model_gives_the_experts_hidden_states(tiny_family: TinyFamily, name: str) -> None:
    model = AutoModel.from_pretrained(tiny_family.deltas[name])
    assert isinstance(model, LlamaModel)
    expected = dense_model(tiny_family.base, tiny_family.deltas[name]).model
    x = prompt(rows=2)
    torch.testing.assert_close(
        model(x).last_hidden_state, expected(x).last_hidden_state, atol=ATOL, rtol=0, check_stride=False
    )
    base = AutoModel.from_pretrained(tiny_family.base)
    assert (model(x).last_hidden_state - base(x).last_hidden_state).abs().max() > 100 * ATOL


def test_the_headless_model_drops_an_untied_head_and_nothing_else(untied_family: TinyFamily) -> None:
    model = AutoModel.from_pretrained(untied_family.deltas["code"])
    expected = dense_model(untied_family.base, untied_family.deltas["code"]).model
    x = prompt()
    torch.testing.assert_close(model(x).last_hidden_state, expected(x).last_hidden_state, atol=ATOL, rtol=0)
    stored = set(load_file(untied_family.deltas["code"] / WEIGHTS))
    held = sum(".meswitch_delta." in key for key in model.state_dict())
    assert held == sum("lm_head" not in key for key in stored) == len(stored) - 2
    with pytest.raises(UnsupportedOperationError, match="lm_head"):
        model.get_adapter_state_dict()


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_tensors_that_no_module_takes_are_an_error(auto: type, tiny_family: TinyFamily, tmp_path: Path) -> None:
    extra = edited(tiny_family.deltas["math"], tmp_path / "extra")
    tensors = load_file(extra / WEIGHTS)
    tensors["base_model.model.model.layers.7.mlp.up_proj.meswitch_delta.step"] = torch.ones(128)
    save_file(tensors, extra / WEIGHTS)
    with pytest.raises(DeltaFormatError, match=r"layers\.7\.mlp\.up_proj.*not announced"):
        auto.from_pretrained(extra)

    deeper = edited(tiny_family.deltas["math"], tmp_path / "deeper")
    config = (deeper / "adapter_config.json").read_text().replace('"model.layers.1.', '"model.layers.7.')
    (deeper / "adapter_config.json").write_text(config)
    tensors = {key.replace(".layers.1.", ".layers.7."): t for key, t in load_file(deeper / WEIGHTS).items()}
    save_file(tensors, deeper / WEIGHTS)
    with pytest.raises(BaseMismatchError, match=r"layers\.7\."):
        auto.from_pretrained(deeper)


def test_adapter_calls_follow_transformers(tiny_family: TinyFamily) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    logits = {name: dense_model(tiny_family.base, tiny_family.deltas[name])(prompt()).logits for name in NAMES}
    logits["base"] = base(prompt()).logits
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)

    def answers(expected: str) -> bool:
        width = logits[expected].shape[-1]
        got = model(prompt()).logits
        assert torch.isneginf(got[..., width:]).all()
        return torch.allclose(got[..., :width], logits[expected], atol=ATOL, rtol=0)

    for name in NAMES:
        info = model.load_adapter(str(tiny_family.deltas[name]), adapter_name=name)
        assert not info.missing_keys
        assert not info.unexpected_keys
        assert model.active_adapters() == [name]
        assert answers(name)
    model.set_adapter("math")
    assert answers("math")
    assert not answers("base")
    model.disable_adapters()
    assert answers("base")
    assert model.active_adapters() == ["math"]
    model.enable_adapters()
    assert answers("math")
    model.set_adapter(["code"])
    assert answers("code")
    for name in NAMES:
        stored = load_file(tiny_family.deltas[name] / WEIGHTS)
        held = model.get_adapter_state_dict(name)
        assert {f"base_model.model.{key}" for key in held} == set(stored)
        assert all(torch.equal(tensor, stored[f"base_model.model.{key}"]) for key, tensor in held.items())
    assert model.get_adapter_state_dict().keys() == model.get_adapter_state_dict("code").keys()
    model.delete_adapter("code")
    assert model.active_adapters() == ["math"]
    assert answers("math")
    model.delete_adapter("math")
    assert type(model) is type(base)
    assert not hasattr(model, "peft_config")
    assert model.config.vocab_size == VOCAB_SIZE
    ours, stock = model.state_dict(), base.state_dict()
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    assert torch.equal(model(prompt()).logits, logits["base"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_expert_can_be_handed_over_as_tensors(tiny_family: TinyFamily) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"])
    first, second = (AutoModelForCausalLM.from_pretrained(tiny_family.base) for _ in range(2))
    second.load_adapter(str(tiny_family.deltas["math"]), adapter_name="math")
    for model in (first, second):
        model.load_adapter(
            peft_config=whole.peft_config["default"],
            adapter_state_dict=whole.get_adapter_state_dict(),
            adapter_name="handed",
        )
        assert torch.equal(model(prompt()).logits, whole(prompt()).logits)


def test_a_model_loaded_from_a_delta_ends_where_the_expert_ends(tiny_family: TinyFamily) -> None:
    assert AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"]).generation_config.eos_token_id == CODE_EOS
    assert AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"]).generation_config.eos_token_id == BASE_EOS


def test_a_model_that_a_caller_loaded_keeps_its_generation_defaults(tiny_family: TinyFamily, tmp_path: Path) -> None:
    delta = edited(tiny_family.deltas["math"], tmp_path / "delta")
    GenerationConfig(do_sample=True, temperature=1.7).save_pretrained(delta)
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    model.generation_config.max_new_tokens = 7
    before = model.generation_config.to_dict()
    model.load_adapter(str(delta), adapter_name="math")
    assert model.generation_config.to_dict() == before
    assert AutoModelForCausalLM.from_pretrained(delta).generation_config.temperature == 1.7


def test_resizing_a_model_with_experts_is_refused(tiny_family: TinyFamily) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"])
    before = ModelState(model)
    with pytest.raises(UnsupportedOperationError, match=r"cannot be resized.*merge_and_unload"):
        model.resize_token_embeddings(140)
    before.assert_unchanged(model)
    plain = model.merge_and_unload()
    plain.resize_token_embeddings(140)
    assert plain(prompt()).logits.shape[-1] == 140


def edited(delta: Path, copy: Path) -> Path:
    """A copy of a delta repo to damage; no file of the original is touched."""
    return Path(shutil.copytree(delta, copy))
