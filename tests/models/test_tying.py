from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures_models import TinyFamily
from tests.model_state import ModelState
from tests.models.conftest import Case
from tests.models.reference import distance
from transformers_meswitch import MESwitchModelForCausalLM

TOLERANCE = 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize(("tied", "expert_tied"), [(True, False), (False, True)])
@torch.no_grad()
def test_expert_tied_otherwise_than_its_base(
    make_case: Callable[..., Case],
    ids: torch.Tensor,
    tmp_path: Path,
    model_type: str,
    tied: bool,
    expert_tied: bool,
) -> None:
    case = make_case(model_type, tied, 4, expert_tied=expert_tied)
    head, embedding = case.reference.get_output_embeddings(), case.reference.get_input_embeddings()
    assert torch.equal(head.weight, embedding.weight) is expert_tied
    expected, of_base = case.reference(ids).logits, AutoModelForCausalLM.from_pretrained(case.base)(ids).logits

    model = AutoModelForCausalLM.from_pretrained(case.delta)
    assert distance(model(ids).logits, expected) < TOLERANCE
    model.merge_adapter()
    assert distance(model(ids).logits, expected) < TOLERANCE
    model.disable_adapters()
    assert distance(model(ids).logits, of_base) == 0

    family = MESwitchModelForCausalLM.from_pretrained(case.base, experts={"tuned": case.delta})
    with family._meswitch_switch.rows([None, "tuned"]):
        mixed = family(ids).logits
    assert distance(mixed[0], of_base[0]) < TOLERANCE
    assert distance(mixed[1], expected[1]) < TOLERANCE

    # What is left after merging is a stock model that survives its own checkpoint.
    family.set_expert("tuned")
    plain = family.merge_and_unload()
    plain.save_pretrained(tmp_path)
    assert distance(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected) < TOLERANCE


def test_tying_a_model_with_experts_again_changes_nothing(tiny_family: TinyFamily) -> None:
    """lm-eval calls this of every model that it loads."""
    for name, delta in tiny_family.deltas.items():
        model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
        model.load_adapter(str(delta), adapter_name=name)
        before = ModelState(model)
        model.tie_weights()
        before.assert_unchanged(model)
        base = model.get_output_embeddings()
        assert getattr(base, "base_layer", base).weight is model.get_input_embeddings().base_layer.weight
