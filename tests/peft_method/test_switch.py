"""The ways to choose an expert never disagree, whatever calls them, and in whichever thread."""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig

from tests.fixtures_models import TinyFamily
from tests.model_state import ATOL, ModelState, generated, prompt
from transformers_meswitch.errors import ExpertNotFoundError, UnsupportedOperationError
from transformers_meswitch.peft_method.switch import ExpertInfo, ExpertSwitch


def answering(model: Any, expected: Any) -> str | None:
    """Who answers a plain forward, judged by the logits alone."""
    logits = model(prompt()).logits
    fitting = [n for n in ("math", "code", None) if torch.allclose(logits, expected(n, prompt()), atol=ATOL, rtol=0)]
    assert len(fitting) == 1
    return fitting[0]


def test_every_way_to_choose_is_seen_by_every_other(model: Any, expected: Any, dense: Any) -> None:
    choices = [
        ("set_expert", "math", "math"),
        ("set_adapter", "code", "code"),
        ("set_expert", None, None),
        ("set_adapter", ["math"], "math"),
        ("set_expert", "base", None),
        ("set_expert", "code", "code"),
        ("set_expert", "__base__", None),
    ]
    for call, argument, active in choices:
        getattr(model, call)(argument)
        assert model.active_expert == active
        assert model.active_adapters() == ([] if active is None else [active])
        assert answering(model, expected) == active
        assert generated(model) == generated(dense[active])
        layer = model.model.layers[0].mlp.up_proj
        assert layer.active_adapters == model.active_adapters()


def test_the_experts_of_one_call_leave_the_sticky_choice(model: Any, expected: Any, dense: Any) -> None:
    model.set_expert("math")
    for expert in ("code", None, "base", ["code"], "math"):
        single = expert[0] if isinstance(expert, list) else expert
        twin = dense[None if single == "base" else single]
        assert generated(model, expert=expert) == generated(twin)
        assert model.active_adapters() == ["math"]
        assert answering(model, expected) == "math"


def test_precedence_is_call_then_generation_config_then_sticky(model: Any, dense: Any) -> None:
    model.set_expert("math")
    model.generation_config.expert = "code"
    assert generated(model) == generated(dense["code"])
    own = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    own.expert = "math"
    assert model.generate(prompt(), own).tolist() == generated(dense["math"])
    assert generated(model, expert=None) == generated(dense[None])
    assert model.generate(prompt(), own, expert="code").tolist() == generated(dense["code"])
    del model.generation_config.expert
    assert generated(model) == generated(dense["math"])


def test_peft_rows_go_before_the_generation_config(peft_model: PeftModel, dense: Any) -> None:
    peft_model.get_base_model().generation_config.expert = "math"
    answer = peft_model.generate(input_ids=prompt(), adapter_names=["code"], max_new_tokens=8, do_sample=False)
    assert answer.tolist() == generated(dense["code"])


def test_disabled_means_the_base_until_enabled_or_chosen(model: Any, expected: Any) -> None:
    model.set_adapter("math")
    model.disable_adapters()
    assert model.active_expert is None
    assert model.active_adapters() == ["math"]
    assert answering(model, expected) is None
    with pytest.raises(UnsupportedOperationError, match=r"'code'.*disabled.*enable_adapters"):
        model.generate(prompt(), expert="code")
    model.set_adapter("code")  # as in transformers, choosing does not enable
    assert answering(model, expected) is None
    model.enable_adapters()
    assert answering(model, expected) == "code"
    model.disable_adapters()
    model.set_expert("math")
    assert answering(model, expected) == "math"


def test_peft_and_the_model_inside_agree(peft_model: PeftModel, tiny_family: TinyFamily, expected: Any) -> None:
    inside = peft_model.get_base_model()
    inside.set_expert("code")
    assert peft_model.active_adapters == ["code"]
    assert answering(peft_model, expected) == "code"
    peft_model.load_adapter(tiny_family.deltas["math"], adapter_name="third")
    assert peft_model.active_adapters == inside.active_adapters() == ["code"]
    assert answering(peft_model, expected) == "code"
    peft_model.set_adapter("math")
    assert inside.active_expert == "math"
    inside.set_expert(None)
    assert peft_model.active_adapters == []
    assert answering(peft_model, expected) is None
    peft_model.set_adapter("third")
    peft_model.delete_adapter("third")
    assert peft_model.active_adapters == inside.active_adapters()
    assert answering(peft_model, expected) == inside.active_expert


def test_an_unknown_expert_is_refused_with_the_names_of_those_loaded(model: Any) -> None:
    before = ModelState(model)
    calls = [
        lambda: model.set_expert("chess"),
        lambda: model.set_adapter("chess"),
        lambda: model.set_adapter(["math", "chess"]),
        lambda: model.delete_adapter("chess"),
        lambda: model.delete_adapter(["math", "chess"]),
        lambda: model.generate(prompt(), expert="chess"),
        lambda: model.generate(prompt(rows=2), expert=["math", "chess"]),
        lambda: model.get_adapter_state_dict("chess"),
        lambda: model.merge_adapter(["chess"]),
        lambda: model.merge_adapter("chess"),
        lambda: model.tokenizer_for("chess"),
    ]
    for call in calls:
        with pytest.raises(ExpertNotFoundError, match=r"'chess'.*'math', 'code'"):
            call()
    with pytest.raises(UnsupportedOperationError, match=r"\['math', 'code'\]"):
        model.set_adapter(["math", "code"])
    with pytest.raises(ExpertNotFoundError, match=r"set_expert\(None\)"):
        model.set_adapter(None)
    before.assert_unchanged(model)


def test_threads_with_different_experts_do_not_mix(model: Any) -> None:
    model.set_expert(None)
    names = ("math", "code", None, "math")
    alone = [generated(model, prompt(rows=3), expert=name, max_new_tokens=12) for name in names]
    assert len({str(answer) for answer in alone}) == 3
    together: list[list[Any]] = [[] for _ in names]
    start = threading.Barrier(len(names))

    def work(slot: int) -> None:
        start.wait()
        for _ in range(4):
            together[slot].append(generated(model, prompt(rows=3), expert=names[slot], max_new_tokens=12))

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for slot, answers in enumerate(together):
        assert answers == [alone[slot]] * 4


def test_a_deep_copy_is_a_model_of_its_own(model: Any, expected: Any) -> None:
    model.set_expert("math")
    twin = copy.deepcopy(model)
    assert answering(twin, expected) == "math"
    twin.set_expert("code")
    assert (answering(model, expected), answering(twin, expected)) == ("math", "code")
    ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not any(tensor.data_ptr() in ours for tensor in twin.state_dict().values() if tensor.numel())
    twin.merge_adapter()
    twin.unmerge_adapter()
    twin.delete_adapter("math")
    assert model.experts == ["math", "code"]
    assert generated(model, prompt(rows=2), expert=["math", "code"]) != generated(model, prompt(rows=2), expert=None)
    head, embedding = twin.get_output_embeddings(), twin.get_input_embeddings()
    assert head.base_layer.weight is embedding.base_layer.weight
    assert answering(twin, expected) == "code"


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "double"])
def test_casting_the_model_keeps_the_stored_tensors(model: Any, cast: str) -> None:
    before = {k: t.clone() for k, t in model.state_dict().items() if ".meswitch_delta." in k}
    model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    after = {k: t for k, t in model.state_dict().items() if ".meswitch_delta." in k}
    assert after.keys() == before.keys()
    assert all(after[k].dtype == before[k].dtype and torch.equal(after[k], before[k]) for k in before)
    assert {t.dtype for k, t in model.state_dict().items() if k not in before} == {
        {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    }
    assert torch.isfinite(model(prompt()).logits).all()


def test_choosing_changes_nothing_but_the_choice(model: Any) -> None:
    model.set_expert("math")
    before = ModelState(model)
    for name, disabled in itertools.product(("code", None), (True, False)):
        model.set_expert(name)
        if disabled:
            model.disable_adapters()
    model.enable_adapters()
    model.set_expert("math")
    before.assert_unchanged(model)


def test_the_only_expert_of_a_batch() -> None:
    switch = ExpertSwitch(base_vocab_size=8)
    for name in ("a", "b"):
        switch.enter(name, ExpertInfo(vocab_size=8))
    assert switch.sole_expert is None
    switch.set_active(["a"])
    assert switch.sole_expert == "a"
    for names, sole in ((["b"], "b"), (["b", "b"], "b"), (["a", "b"], None), (["a", None], None), ([None], None)):
        with switch.rows(names):
            assert switch.sole_expert == sole
    other = ExpertSwitch(base_vocab_size=8)
    with other.rows([None]):
        assert switch.sole_expert == "a"
    for attribute, value in (("disabled", True), ("merged", "a"), ("pending", "a")):
        before = getattr(switch, attribute)
        setattr(switch, attribute, value)
        assert switch.sole_expert is None
        setattr(switch, attribute, before)
    assert switch.sole_expert == "a"
