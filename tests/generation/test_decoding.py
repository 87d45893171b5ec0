"""The ways of decoding that transformers has, with an expert per row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, set_seed

from tests.fixtures_models import TinyFamily
from tests.generation.conftest import NAMES, PROMPT
from tests.generation.equality import same_answer
from transformers_meswitch.errors import UnsupportedOperationError

NEW = 8
NO_EOS: dict[str, Any] = {"eos_token_id": 999, "pad_token_id": 0}
ROWS = PROMPT.repeat(len(NAMES), 1)


def test_beams_and_return_sequences(family: Any, references: dict[str | None, Any]) -> None:
    how = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": NEW, **NO_EOS}
    found = family.generate(ROWS, expert=list(NAMES), **how)
    assert found.shape[0] == 2 * len(NAMES)
    expected = {name: references[name].generate(PROMPT, **how) for name in NAMES}
    for row, name in enumerate(NAMES):
        assert torch.equal(found[2 * row : 2 * row + 2], expected[name])
    assert not torch.equal(expected["math"], expected["code"])


def test_sampling_one_seed_a_row(family: Any, references: dict[str | None, Any]) -> None:
    how = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": NEW, **NO_EOS}
    for name in NAMES:
        set_seed(3)
        expected = references[name].generate(PROMPT, **how)
        set_seed(3)
        found = family.generate(PROMPT, expert=name, **how)
        # Vocabularies of one width draw the same random numbers; the wider logits of others do not.
        if name == "code":
            assert torch.equal(found, expected)
        set_seed(3)
        assert torch.equal(family.generate(PROMPT, expert=name, **how), found)


def test_return_sequences_when_sampling(family: Any) -> None:
    set_seed(0)
    found = family.generate(ROWS, expert=list(NAMES), do_sample=True, num_return_sequences=4, max_new_tokens=NEW)
    assert found.shape[0] == 4 * len(NAMES)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(family: Any, references: dict[str | None, Any], cache: str) -> None:
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, **NO_EOS}
    found = family.generate(ROWS, expert=list(NAMES), cache_implementation=cache, **how)
    for row, name in enumerate(NAMES):
        assert same_answer(references[name], references[name].generate(PROMPT, **how)[0], found[row])


def test_without_cache(family: Any, references: dict[str | None, Any]) -> None:
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, **NO_EOS}
    found = family.generate(ROWS, expert=list(NAMES), use_cache=False, **how)
    for row, name in enumerate(NAMES):
        assert same_answer(references[name], references[name].generate(PROMPT, **how)[0], found[row])


def test_inputs_embeds(family: Any, references: dict[str | None, Any]) -> None:
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, **NO_EOS}
    embeds = torch.cat([references[name].get_input_embeddings()(PROMPT) for name in NAMES]).detach()
    found = family.generate(inputs_embeds=embeds, expert=list(NAMES), **how)
    for row, name in enumerate(NAMES):
        expected = references[name].generate(PROMPT, **how)[0]
        assert same_answer(references[name], expected, torch.cat([PROMPT[0], found[row]]))


def test_streamer(family: Any, tiny_family: TinyFamily) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_family.deltas["code"])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = family.generate(PROMPT, expert="code", streamer=streamer, do_sample=False, max_new_tokens=NEW)
    assert "".join(streamer) == tokenizer.decode(output[0, PROMPT.shape[1] :])


@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup(family: Any, references: dict[str | None, Any], name: str | None) -> None:
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, **NO_EOS}
    expected = references[name].generate(PROMPT, **how)
    found = family.generate(PROMPT, expert=name, prompt_lookup_num_tokens=3, **how)
    assert same_answer(references[name], expected[0], found[0])


def test_assistant_model(family: Any, references: dict[str | None, Any], tiny_family: TinyFamily) -> None:
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, **NO_EOS}
    expected = references["code"].generate(PROMPT, **how)
    for assistant in (references["code"], AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"])):
        found = family.generate(PROMPT, expert="code", assistant_model=assistant, **how)
        assert same_answer(references["code"], expected[0], found[0])
        assert family.active_adapters() == []


def test_assisting_a_batch_is_refused_by_transformers(family: Any, references: dict[str | None, Any]) -> None:
    with pytest.raises(ValueError, match="batch_size = 1"):
        family.generate(ROWS, expert=list(NAMES), assistant_model=references["code"], max_new_tokens=4)


def test_classifier_free_guidance(family: Any, references: dict[str | None, Any]) -> None:
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "guidance_scale": 1.5, **NO_EOS}
    found = family.generate(PROMPT, expert="math", **how)
    assert torch.equal(found, references["math"].generate(PROMPT, **how))


def test_an_assistant_must_have_the_rows_vocabulary(family: Any, references: dict[str | None, Any]) -> None:
    own = family.generate(PROMPT, expert="code", do_sample=False, max_new_tokens=8)
    for assistant in (references["code"], family):
        found = family.generate(PROMPT, expert="code", assistant_model=assistant, do_sample=False, max_new_tokens=8)
        assert torch.equal(found, own)
    for name, assistant in (("math", references[None]), ("code", references[None]), ("math", references["code"])):
        with pytest.raises(UnsupportedOperationError, match=rf"assistant knows .*'{name}'.*assistant_tokenizer"):
            family.generate(PROMPT, expert=name, assistant_model=assistant, do_sample=False, max_new_tokens=8)
    other = copy.deepcopy(family)
    with pytest.raises(UnsupportedOperationError, match=r"assistant knows 128 ids.*'code' knows 132"):
        family.generate(PROMPT, expert="code", assistant_model=other, do_sample=False, max_new_tokens=8)
