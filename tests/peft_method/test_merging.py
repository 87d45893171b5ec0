"""Merging writes base + delta, and unmerging gives back the very tensors that were there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fixtures_models import CODE_VOCAB_SIZE, VOCAB_SIZE, TinyFamily, dense_model
from tests.model_state import ATOL, ModelState, generated, prompt
from transformers_meswitch.errors import ExpertNotFoundError, UnsupportedOperationError
from transformers_meswitch.peft_method.linear_layer import LinearLayer


def base_parameters(model: Any) -> dict[str, tuple[torch.Tensor, int]]:
    """Value and storage of every tensor that is not a delta's."""
    named = model.named_parameters(remove_duplicate=False)
    return {n: (p.detach().clone(), p.data_ptr()) for n, p in named if ".meswitch_delta." not in n}


@pytest.fixture(params=["transformers", "peft"])
def either(request: pytest.FixtureRequest) -> Any:
    """A model with both experts by either library's calls."""
    return request.getfixturevalue("model" if request.param == "transformers" else "peft_model")


@pytest.mark.parametrize("name", ["math", "code"])
def test_merged_logits_match_and_unmerge_is_exact(either: Any, expected: Any, name: str) -> None:
    either.set_adapter(name)
    before, logits = base_parameters(either), either(prompt()).logits
    either.merge_adapter(safe_merge=True)
    assert not torch.equal(base_parameters(either)[linear(either)][0], before[linear(either)][0])
    torch.testing.assert_close(either(prompt()).logits, expected(name, prompt()), atol=ATOL, rtol=0)
    embedding, head = (inner(either).get_input_embeddings(), inner(either).get_output_embeddings())
    assert head.base_layer.weight is embedding.base_layer.weight
    either.unmerge_adapter()
    after = base_parameters(either)
    assert after.keys() == before.keys()
    for key, (value, storage) in before.items():
        assert torch.equal(after[key][0], value), key
        assert after[key][1] == storage, key
    assert torch.equal(either(prompt()).logits, logits)
    assert head.base_layer.weight is embedding.base_layer.weight


def test_while_merged_other_experts_are_refused_by_name(either: Any) -> None:
    either.set_adapter("math")
    either.merge_adapter()
    either.merge_adapter()  # merging what is merged changes nothing
    with pytest.raises(UnsupportedOperationError, match=r"'math' is merged.*unmerge_adapter"):
        either.merge_adapter(adapter_names=["code"])
    with pytest.raises((UnsupportedOperationError, ValueError), match=r"merged|unmerge"):
        either.delete_adapter("math")
    merged = either(prompt()).logits
    either.unmerge_adapter()
    torch.testing.assert_close(either(prompt()).logits, merged, atol=ATOL, rtol=0)


def test_choosing_another_expert_while_one_is_merged(model: Any, peft_model: PeftModel, expected: Any) -> None:
    model.set_adapter("math")
    model.merge_adapter()
    model.set_adapter("code")
    with pytest.raises(UnsupportedOperationError, match=r"'math' is merged.*unmerge_adapter"):
        model(prompt())
    with pytest.raises(UnsupportedOperationError, match=r"'math' is merged.*unmerge_adapter"):
        model.generate(prompt(rows=2), expert=["math", None])
    peft_model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        peft_model.set_adapter("code")
    torch.testing.assert_close(peft_model(prompt()).logits, expected("code", prompt()), atol=ATOL, rtol=0)


def test_the_merged_expert_answers_whichever_was_active(either: Any, expected: Any) -> None:
    either.set_adapter("code")
    either.merge_adapter(["math"])
    assert inner(either).active_expert == "math"
    torch.testing.assert_close(either(prompt()).logits, expected("math", prompt()), atol=ATOL, rtol=0)
    with pytest.raises(UnsupportedOperationError, match=r"so 'code' and the base cannot be computed"):
        either(prompt(rows=2), adapter_names=["code", "__base__"]) if either is not inner(either) else either.generate(
            prompt(rows=2), expert=["code", None], max_new_tokens=1
        )
    either.unmerge_adapter()
    inner(either).set_expert(None)
    either.merge_adapter(["math"])
    assert len(generated(either)[0]) > 5
    with pytest.raises(UnsupportedOperationError, match=r"so the base cannot be computed"):
        inner(either).generate(prompt(), expert=None, max_new_tokens=1)


def test_dense_weights_are_built_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = LinearLayer.merged_parameters
    monkeypatch.setattr(LinearLayer, "merged_parameters", lambda *a: built.append(a) or original(*a))
    model.merge_adapter(["math"])
    assert len(built) == sum("math" in n and n.endswith("codes") for n, _ in model.named_parameters())


def test_another_expert_can_be_deleted_while_one_is_merged(model: Any, expected: Any) -> None:
    before = base_parameters(model)
    model.set_adapter("math")
    model.merge_adapter()
    model.delete_adapter("code")
    torch.testing.assert_close(model(prompt()).logits, expected("math", prompt())[..., :VOCAB_SIZE], atol=ATOL, rtol=0)
    model.unmerge_adapter()
    after = base_parameters(model)
    assert [(k.replace(".base_layer", ""), s) for k, (_, s) in after.items()] == [
        (k.replace(".base_layer", ""), s) for k, (_, s) in before.items()
    ]
    model.delete_adapter("math")
    torch.testing.assert_close(model(prompt()).logits, expected(None, prompt())[..., :VOCAB_SIZE], atol=0, rtol=0)


def test_what_cannot_be_merged_is_refused_before_anything_changes(either: Any) -> None:
    before = ModelState(inner(either))
    with pytest.raises(ExpertNotFoundError, match=r"'chess'.*'math', 'code'"):
        either.merge_adapter(adapter_names=["chess"])
    with pytest.raises(UnsupportedOperationError, match="one expert"):
        either.merge_adapter(adapter_names=["math", "code"])
    before.assert_unchanged(inner(either))


def test_safe_merge_refuses_infinity_and_leaves_the_base(either: Any) -> None:
    either.set_adapter("code")
    layer = inner(either).model.layers[1].mlp.down_proj
    layer.stored_delta("code").step[0] = float("inf")
    before = base_parameters(either)
    with pytest.raises(ValueError, match=r"'code' gives non-finite values"):
        either.merge_adapter(safe_merge=True)
    after = base_parameters(either)
    assert all(torch.equal(after[key][0], value) for key, (value, _) in before.items())


def test_disabling_a_merged_expert_unmerges_it(either: Any, expected: Any) -> None:
    either.set_adapter("math")
    either.merge_adapter()
    (either.disable_adapters if hasattr(either, "disable_adapters") else either.base_model.disable_adapter_layers)()
    torch.testing.assert_close(either(prompt()).logits, expected(None, prompt()), atol=ATOL, rtol=0)


@pytest.mark.parametrize("family_fixture", ["tiny_family", "untied_family"])
@pytest.mark.parametrize("name", ["math", "code"])
@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_a_merged_and_unloaded_model_is_a_plain_one(
    name: str, library: str, family_fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family: TinyFamily = request.getfixturevalue(family_fixture)
    model = AutoModelForCausalLM.from_pretrained(family.base)
    stock = type(model)
    if library == "peft":
        model = PeftModel.from_pretrained(model, family.deltas[name], adapter_name=name)
    else:
        model.load_adapter(str(family.deltas[name]), adapter_name=name)
    plain = model.merge_and_unload(safe_merge=True)
    twin = dense_model(family.base, family.deltas[name])
    rows = CODE_VOCAB_SIZE if name == "code" else VOCAB_SIZE
    assert type(plain) is stock
    assert not hasattr(plain, "peft_config")
    assert plain.config.vocab_size == plain.get_input_embeddings().num_embeddings == rows
    assert plain.get_output_embeddings().out_features == rows
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == plain.config.tie_word_embeddings == (family_fixture == "tiny_family")
    assert plain.state_dict().keys() == twin.state_dict().keys()
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[key], value, atol=1e-6, rtol=0)
    assert generated(plain) == generated(twin)
    plain.save_pretrained(tmp_path)
    torch.save(plain(prompt()).logits, tmp_path / "logits.pt")
    # A process that never imports this package must read it.
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'transformers_meswitch' not in sys.modules\n"
        f"logits = model(torch.tensor({prompt().tolist()})).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[1] + '/logits.pt')), 'other logits'\n"
    )
    if library == "peft" and family_fixture == "tiny_family":
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(prompt()).logits, plain(prompt()).logits)


def inner(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def linear(model: Any) -> str:
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return f"{prefix}model.layers.0.mlp.up_proj.base_layer.weight"


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_what_was_set_aside_follows_the_model(model: Any, tiny_family: TinyFamily, move: Any) -> None:
    stock = move(AutoModelForCausalLM.from_pretrained(tiny_family.base))
    model.set_adapter("math")
    model.merge_adapter()
    move(model)
    model.unmerge_adapter()
    model.set_expert(None)
    assert {p.dtype for n, p in model.named_parameters() if ".meswitch_delta." not in n} == {stock.dtype}
    assert torch.equal(model(prompt()).logits[..., :VOCAB_SIZE], stock(prompt()).logits)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.base_layer.weight is embedding.base_layer.weight
