"""The model's own call: experts deleted under it, gradients, learned positions, capped logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.fixtures_models import TinyFamily, fine_tune
from tests.generation.conftest import PROMPT
from tests.model_state import ATOL
from transformers_meswitch import MESwitchConfig, MESwitchModel, MESwitchModelForCausalLM, compress
from transformers_meswitch.errors import ExpertNotFoundError, UnsupportedOperationError

SIZES: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tuned(folder: Path, vocab_size: int = 64) -> Any:
    """The base in ``folder`` with a fine-tune of it, which knows ``vocab_size`` ids, as the expert "tuned"."""
    expert = AutoModelForCausalLM.from_pretrained(folder / "base")
    expert.resize_token_embeddings(vocab_size, mean_resizing=False)
    fine_tune(expert, 3, (5, *range(64, vocab_size)))
    expert.save_pretrained(folder / "expert")
    compress(
        folder / "base", folder / "expert", folder / "delta", MESwitchConfig(bits=4), calibration=None, progress=False
    )
    return MESwitchModelForCausalLM.from_pretrained(folder / "base", experts={"tuned": folder / "delta"})


def test_deleting_an_expert_under_a_call(family: Any, tiny_family: TinyFamily) -> None:
    def delete_and_call(model: Any, name: str) -> None:
        with model._meswitch_switch.rows([name]):
            model.delete_adapter(name)
            model(PROMPT)

    bare = MESwitchModel.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))
    for model in (family, bare):
        with pytest.raises(ExpertNotFoundError, match="'math' was deleted while"):
            delete_and_call(model, "math")
    # With the last expert go all its layers, so the base answers the rest of the call.
    with pytest.raises(ExpertNotFoundError, match="'default' was deleted while"):
        delete_and_call(AutoModel.from_pretrained(tiny_family.deltas["math"]), "default")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family: Any, reentrant: bool) -> None:
    def gradient(checkpointing: bool) -> torch.Tensor:
        if checkpointing:
            family.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        else:
            family.gradient_checkpointing_disable()
        embeds = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        family(inputs_embeds=embeds).logits[..., :128].pow(2).mean().backward()
        assert embeds.grad is not None
        return embeds.grad

    family.train()
    family.set_expert("math")
    sticky = gradient(checkpointing=False)
    torch.testing.assert_close(gradient(checkpointing=True), sticky)
    family.set_expert(None)
    with family._meswitch_switch.rows(["math"]):
        torch.testing.assert_close(gradient(checkpointing=False), sticky)
        with pytest.raises(UnsupportedOperationError, match=r"checkpointing.*set_expert"):
            gradient(checkpointing=True)
        with torch.no_grad():
            family(PROMPT)


def test_learned_positions_of_several_rows_a_prompt(tmp_path: Path) -> None:
    """GPT-2 makes one row of positions for the whole batch, which holds two rows of each prompt here."""
    torch.manual_seed(0)
    config = GPT2Config(**SIZES, n_embd=32, n_layer=1, n_head=2, n_positions=16, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = tuned(tmp_path)
    ids = PROMPT % 64
    with torch.no_grad():
        with model._meswitch_switch.rows(["tuned", None]):
            mixed = model(ids.repeat(4, 1)).logits
        for rows, name in ((slice(0, 2), "tuned"), (slice(2, 4), None)):
            model.set_expert(name)
            torch.testing.assert_close(mixed[rows], model(ids.repeat(2, 1)).logits, atol=1e-5, rtol=0)


def test_unknown_ids_are_impossible_though_logits_are_capped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(**SIZES, **sizes, num_key_value_heads=1, head_dim=16, final_logit_softcapping=30.0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "base")
    model = tuned(tmp_path, vocab_size=67)
    ids = PROMPT % 64
    with torch.no_grad(), model._meswitch_switch.rows(["tuned", None]):
        logits = model(ids.repeat(2, 1)).logits
    assert logits.shape[-1] == 67
    assert torch.isfinite(logits[0]).all()
    assert torch.isfinite(logits[1, :, :64]).all()
    assert torch.isneginf(logits[1, :, 64:]).all()
    with torch.no_grad():
        assert torch.equal(
            model(ids).logits[..., :64], AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
        )
        assert torch.isneginf(model(ids).logits[..., 64:]).all()


def test_peft_s_adapter_names_choose_an_expert_for_each_row(family: Any, references: dict[str | None, Any]) -> None:
    prompts = PROMPT.repeat(3, 1)
    names = ["math", "code", "__base__"]
    family.set_expert("code")
    logits = family(prompts, adapter_names=names).logits
    for row, name in enumerate(["math", "code", None]):
        expected = references[name](prompts).logits[row]
        assert torch.allclose(logits[row, :, : expected.shape[-1]], expected, atol=ATOL, rtol=0)
    assert not torch.allclose(logits[0, :, :128], logits[2, :, :128], atol=ATOL)
    for refused, error in ((["math", "chess", None], ExpertNotFoundError), (["math"], UnsupportedOperationError)):
        with pytest.raises(error, match=r"chess|for each of 3 rows"):
            family(prompts, adapter_names=refused)
    with pytest.raises(UnsupportedOperationError, match="expected one name for each of 1 rows"):
        family(PROMPT, adapter_names="math")


def test_generate_takes_adapter_names_too(family: Any) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 6}
    prompts, names = PROMPT.repeat(3, 1), ["math", "code", "__base__"]
    found = family.generate(prompts, adapter_names=names, **greedy)
    assert torch.equal(found, family.generate(prompts, expert=names, **greedy))
    with pytest.raises(UnsupportedOperationError, match="expert= and adapter_names="):
        family.generate(prompts, expert="math", adapter_names=names)


@pytest.mark.parametrize("expert", [3, [3], ["math", 3.5]])
def test_names_of_another_type_are_not_found(family: Any, expert: Any) -> None:
    with pytest.raises(ExpertNotFoundError, match=r"No expert named (3|3\.5) is loaded"):
        family.generate(PROMPT, expert=expert)


@pytest.mark.parametrize("expert", ["math", None])
def test_the_models_own_call_takes_no_expert(family: Any, expert: str | None) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"takes no expert\b.*set_expert.*adapter_names"):
        family(PROMPT, expert=expert)


def test_a_call_in_flight_keeps_its_experts_when_adapters_are_disabled(family: Any) -> None:
    with torch.no_grad(), family._meswitch_switch.rows(["math"]):
        before = family(PROMPT).logits
        family.disable_adapters()
        assert torch.equal(family(PROMPT).logits, before)
    with torch.no_grad():
        assert not torch.equal(family(PROMPT).logits, before)
