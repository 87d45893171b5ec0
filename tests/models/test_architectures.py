from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tests.models.architectures import ARCHITECTURES
from tests.models.conftest import Case
from tests.models.reference import distance
from transformers_meswitch import MESwitchModelForCausalLM

TOLERANCE = 1e-4

#: Architecture, whether its embeddings are tied, bits of the delta, whether the checkpoint is spelt as on the Hub.
CASES = [
    *((name, True, 4, False) for name in ARCHITECTURES),
    *((name, False, 2, False) for name in ARCHITECTURES),
    ("gpt2", True, 2, True),
]
MakeCase = Callable[..., Case]
each_case = pytest.mark.parametrize(("model_type", "tied", "bits", "hub_style"), CASES)


@each_case
@torch.no_grad()
def test_delta_repo_equals_base_plus_dense_delta(
    make_case: MakeCase, ids: torch.Tensor, model_type: str, tied: bool, bits: int, hub_style: bool
) -> None:
    case = make_case(model_type, tied, bits, hub_style=hub_style)
    expected = case.reference(ids).logits

    model = AutoModelForCausalLM.from_pretrained(case.delta)
    assert distance(model(ids).logits, expected) < TOLERANCE

    # Neither the base nor the uncompressed expert would pass.
    for other in (case.base, case.expert):
        assert distance(AutoModelForCausalLM.from_pretrained(other)(ids).logits, expected) > 10 * TOLERANCE


@each_case
@torch.no_grad()
def test_automodel_gives_the_experts_hidden_states(
    make_case: MakeCase, ids: torch.Tensor, model_type: str, tied: bool, bits: int, hub_style: bool
) -> None:
    case = make_case(model_type, tied, bits, hub_style=hub_style)
    expected = case.reference.base_model(ids).last_hidden_state
    assert distance(AutoModel.from_pretrained(case.delta)(ids).last_hidden_state, expected) < TOLERANCE


@each_case
@torch.no_grad()
def test_family_answers_each_row_and_merges_exactly(
    make_case: MakeCase, ids: torch.Tensor, model_type: str, tied: bool, bits: int, hub_style: bool
) -> None:
    case = make_case(model_type, tied, bits, hub_style=hub_style)
    base = AutoModelForCausalLM.from_pretrained(case.base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    of_base, of_expert = base(ids).logits, case.reference(ids).logits

    model = MESwitchModelForCausalLM.from_pretrained(case.base, experts={"tuned": case.delta})
    assert distance(model(ids).logits, of_base) == 0
    with model._meswitch_switch.rows(["tuned", None]):
        mixed = model(ids).logits
    assert distance(mixed[0], of_expert[0]) < TOLERANCE
    assert distance(mixed[1], of_base[1]) < TOLERANCE
    assert distance(mixed[1], of_expert[1]) > 10 * TOLERANCE

    model.set_expert("tuned")
    assert distance(model(ids).logits, of_expert) < TOLERANCE
    model.merge_adapter(safe_merge=True)
    assert distance(model(ids).logits, of_expert) < TOLERANCE
    model.unmerge_adapter()
    assert distance(model(ids).logits, of_expert) < TOLERANCE
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    plain = model.merge_and_unload()
    assert type(plain) is type(base)
    assert distance(plain(ids).logits, of_expert) < TOLERANCE


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "mistral", "gemma3_text"])
def test_mixed_rows_generate_as_alone(make_case: MakeCase, ids: torch.Tensor, model_type: str, beams: int) -> None:
    """Learned positions, parallel residuals and sliding windows, past the window's length and with padding."""
    case = make_case(model_type, True, 4)
    base = AutoModelForCausalLM.from_pretrained(case.base)
    prompts = torch.cat([ids, ids[:1]])
    prompts[1, :3] = 0
    how = {"do_sample": False, "max_new_tokens": 8, "num_beams": beams, "eos_token_id": 999, "pad_token_id": 0}
    model = MESwitchModelForCausalLM.from_pretrained(case.base, experts={"tuned": case.delta})
    output = model.generate(prompts, expert=["tuned", "tuned", None], **how)
    for row, stock in enumerate((case.reference, case.reference, base)):
        alone = prompts[row : row + 1, 3 * (row == 1) :]
        expected = stock.generate(alone, **how)
        assert output[row, -expected.shape[1] :].tolist() == expected[0].tolist()
    assert output[0].tolist() != output[2].tolist()
