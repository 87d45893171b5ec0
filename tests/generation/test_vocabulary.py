"""Vocabularies of different sizes side by side: "code" knows 132 ids, base and "math" 128."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from tests.fixtures_models import (
    CODE_EOS,
    CODE_TEMPLATE,
    CODE_VOCAB_SIZE,
    VOCAB_SIZE,
    TinyFamily,
    character_tokenizer,
    dense_model,
    fine_tune,
    llama_config,
)
from tests.generation.conftest import PROMPT
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, compress
from transformers_meswitch.errors import ExpertNotFoundError, VocabularyError

ROWS = [None, "math", "code"]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 5}, {"remove_invalid_values": True}])
def test_no_row_samples_an_id_it_does_not_know(family: Any, how: dict[str, Any]) -> None:
    set_seed(0)
    prompts, copies = PROMPT.repeat(12, 1), how.get("num_return_sequences", 1)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "top_k": 0, "max_new_tokens": 24}
    output = family.generate(prompts, expert=ROWS * 4, eos_token_id=999, pad_token_id=0, **sampling, **how)
    experts = [name for name in ROWS * 4 for _ in range(copies)]
    largest = {
        name: max(int(row.max()) for row, of in zip(output, experts, strict=True) if of == name) for name in ROWS
    }
    assert largest[None] < VOCAB_SIZE
    assert largest["math"] < VOCAB_SIZE
    # The ids are within reach: the expert that knows them does sample them (beams follow the likeliest only).
    assert largest["code"] < CODE_VOCAB_SIZE
    assert largest["code"] >= VOCAB_SIZE or "num_beams" in how


def test_prompt_outside_the_vocabulary(family: Any) -> None:
    prompts = PROMPT.repeat(3, 1)
    prompts[2, 3] = VOCAB_SIZE + 2
    family.generate(prompts, expert=[None, "math", "code"], max_new_tokens=2)
    with pytest.raises(VocabularyError, match=rf"Row 2 .* {VOCAB_SIZE + 2}, but expert 'math' knows ids below 128"):
        family.generate(prompts, expert=["code", None, "math"], max_new_tokens=2)
    with pytest.raises(VocabularyError, match="the base knows ids below 128"):
        family.generate(prompts, max_new_tokens=2)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_masked_padding_may_be_outside_the_vocabulary(family: Any, how: dict[str, Any]) -> None:
    """One tokenizer may have padded all rows: what is masked is not read."""
    prompts = PROMPT.repeat(2, 1)
    prompts[0, :2] = VOCAB_SIZE + 3
    mask = (prompts < VOCAB_SIZE).long()
    for given in ({"inputs": prompts}, {"input_ids": prompts}):
        found = family.generate(**given, attention_mask=mask, expert=["math", "code"], max_new_tokens=4, **how)
        assert torch.equal(found[:, :5], prompts.repeat_interleave(found.shape[0] // 2, 0))
        inside = {"input_ids": prompts * mask, "attention_mask": mask}
        expected = family.generate(**inside, expert=["math", "code"], max_new_tokens=4, **how)
        assert torch.equal(found[:, 5:], expected[:, 5:])
    with pytest.raises(VocabularyError, match=rf"Row 0 holds token id {VOCAB_SIZE + 3}"):
        family.generate(prompts, attention_mask=torch.ones_like(mask), expert=["math", "code"], max_new_tokens=4)


def test_tokenizers(family: Any) -> None:
    chat = [{"role": "user", "content": "1+1="}]
    base, math, code = (family.tokenizer_for(name) for name in (None, "math", "code"))
    assert [len(t) for t in (base, math, code)] == [VOCAB_SIZE, VOCAB_SIZE, CODE_VOCAB_SIZE]
    assert code.eos_token_id == CODE_EOS
    assert code.chat_template == CODE_TEMPLATE
    assert code.apply_chat_template(chat, tokenize=False) == "<add-2>1+1="
    assert base.apply_chat_template(chat, tokenize=False) == "1+1="
    assert family.tokenizer_for("code") is code
    assert family.tokenizer_for("code", padding_side="right") is not code
    with pytest.raises(ExpertNotFoundError, match="'poet'"):
        family.tokenizer_for("poet")


@torch.no_grad()
def test_loss_with_a_resized_vocabulary(tiny_family: TinyFamily) -> None:
    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))
    for name in ("math", "code", None):
        reference = (
            AutoModelForCausalLM.from_pretrained(tiny_family.base)
            if name is None
            else dense_model(tiny_family.base, tiny_family.deltas[name])
        )
        family.set_expert(name)
        expected = reference(PROMPT, labels=PROMPT).loss
        torch.testing.assert_close(family(PROMPT, labels=PROMPT).loss, expected, atol=1e-4, rtol=0)
    assert family.config.vocab_size == CODE_VOCAB_SIZE
    family.delete_adapter("code")
    assert family.config.vocab_size == VOCAB_SIZE


@torch.no_grad()
def test_expert_with_fewer_ids_than_its_base(tmp_path: Path) -> None:
    """Bases are often padded to a multiple of 64 rows; a fine-tune may cut the spare ones off."""
    torch.manual_seed(0)
    config = llama_config(vocab_size=160)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCAB_SIZE)
    fine_tune(base, 7, (5, 40))
    base.save_pretrained(tmp_path / "expert")
    compress(
        tmp_path / "base",
        tmp_path / "expert",
        tmp_path / "delta",
        MESwitchConfig(bits=4),
        calibration=None,
        progress=False,
    )

    family = MESwitchModelForCausalLM.from_pretrained(tmp_path / "base", experts={"small": tmp_path / "delta"})
    reference = dense_model(tmp_path / "base", tmp_path / "delta")
    family.set_expert("small")
    logits = family(PROMPT).logits
    torch.testing.assert_close(logits[..., :VOCAB_SIZE], reference(PROMPT).logits, atol=1e-4, rtol=0)
    assert torch.isneginf(logits[..., VOCAB_SIZE:]).all()
    set_seed(0)
    how: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "top_k": 0, "max_new_tokens": 100}
    output = family.generate(PROMPT.repeat(2, 1), expert=["small", None], eos_token_id=999, pad_token_id=0, **how)
    assert int(output[0].max()) < VOCAB_SIZE <= int(output[1].max())
    with pytest.raises(VocabularyError, match="knows ids below 128"):
        family.generate(torch.tensor([[140]]), expert="small", max_new_tokens=1)
