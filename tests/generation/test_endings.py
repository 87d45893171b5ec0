"""Where a row ends: at its own expert's EOS, not before its minimum length, or where the caller says."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.fixtures_models import TinyFamily
from tests.generation.conftest import NAMES, PROMPT
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.errors import UnsupportedOperationError, VocabularyError

Endings = dict[str | None, int]
References = dict[str | None, Any]
LENGTH = PROMPT.shape[1]
ROWS = PROMPT.repeat(len(NAMES), 1)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}


@pytest.fixture
def model(ending_family: TinyFamily) -> Any:
    """A family in which base and experts end at different ids, each of which their greedy answer holds."""
    return MESwitchModelForCausalLM.from_pretrained(ending_family.base, experts=dict(ending_family.deltas))


def answer(output: torch.Tensor, eos: int | None = None) -> list[int]:
    """New tokens of one row, up to its EOS."""
    tokens = output[LENGTH:].tolist()
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def expected_answer(references: References, endings: Endings, name: str | None, **how: Any) -> list[int]:
    output = references[name].generate(PROMPT, **{**GREEDY, "eos_token_id": endings[name], "pad_token_id": 0, **how})
    return answer(output[0], endings[name])


def test_each_row_ends_at_its_own_eos(model: Any, references: References, endings: Endings) -> None:
    output = model.generate(ROWS, expert=list(NAMES), **GREEDY)
    lengths = set()
    for row, name in enumerate(NAMES):
        expected = expected_answer(references, endings, name)
        assert expected[-1] == endings[name]
        assert answer(output[row], endings[name]) == expected
        assert set(output[row, LENGTH + len(expected) :].tolist()) <= {0}
        lengths.add(len(expected))
    assert len(lengths) == len(NAMES)
    assert output.shape[1] == LENGTH + max(lengths)  # generation stops once the last row has


def test_a_row_given_another_eos_runs_on(model: Any, references: References, endings: Endings) -> None:
    """The test above can fail: with the EOS of base and "math" exchanged, neither row ends where it should."""
    switch = model._meswitch_switch
    switch.base_eos_token_id = model.generation_config.eos_token_id = (endings["math"],)
    switch.experts["math"] = dataclasses.replace(switch.experts["math"], eos_token_id=(endings[None],))
    output = model.generate(ROWS, expert=list(NAMES), **GREEDY)
    for row, name in enumerate(NAMES):
        wrong = answer(output[row]) != answer(output[row], endings[name]) + [0] * (
            output.shape[1] - LENGTH - len(answer(output[row], endings[name]))
        )
        assert wrong is (name != "code")


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_for_all_rows(model: Any, references: References, endings: Endings, name: str | None) -> None:
    output = model.generate(PROMPT.repeat(2, 1), expert=name, **GREEDY)
    assert [answer(row) for row in output] == [expected_answer(references, endings, name)] * 2
    model.set_expert(name)
    assert torch.equal(model.generate(PROMPT.repeat(2, 1), **GREEDY), output)


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("pad", [0, 3])
def test_beams(model: Any, references: References, early_stopping: bool, pad: int) -> None:
    how: dict[str, Any] = {**GREEDY, "num_beams": 3, "num_return_sequences": 3, "pad_token_id": pad}
    switch, endings = model._meswitch_switch, {}
    for position, name in zip((2, 5, 8), NAMES, strict=True):  # ids that the beams reach
        endings[name] = int(references[name].generate(PROMPT, **how, eos_token_id=999)[0, LENGTH + position])
    for name in ("math", "code"):
        switch.experts[name] = dataclasses.replace(switch.experts[name], eos_token_id=(endings[name],))
    switch.base_eos_token_id = (endings[None],)
    model.generation_config.eos_token_id = endings[None]

    how["early_stopping"] = early_stopping
    output = model.generate(ROWS, expert=list(NAMES), **how)
    ended = False
    for row, name in enumerate(NAMES):
        expected = references[name].generate(PROMPT, **how, eos_token_id=endings[name])
        for beam in range(3):
            found = output[3 * row + beam]
            tokens = answer(found, endings[name])
            assert tokens == answer(expected[beam], endings[name])
            assert set(found[LENGTH + len(tokens) :].tolist()) <= {pad}
            ended = ended or len(tokens) < output.shape[1] - LENGTH
    assert ended


def test_several_eos_of_one_expert(model: Any, references: References, endings: Endings) -> None:
    model._meswitch_switch.base_eos_token_id = (endings[None], endings["math"])
    both = {**endings, None: [endings[None], endings["math"]]}
    for how in ({}, {"num_beams": 3}):
        output = model.generate(ROWS, expert=list(NAMES), **GREEDY, **how)
        expected = references[None].generate(PROMPT, **GREEDY, **how, eos_token_id=both[None], pad_token_id=0)
        assert output[2, : expected.shape[1]].tolist() == expected[0].tolist()


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 7}, {"min_length": LENGTH + 7}])
def test_minimum_length(model: Any, references: References, endings: Endings, minimum: dict[str, int]) -> None:
    output = model.generate(ROWS, expert=list(NAMES), **GREEDY, **minimum)
    for row, name in enumerate(NAMES):
        expected = expected_answer(references, endings, name, **minimum)
        assert len(expected) >= 7
        assert answer(output[row])[: len(expected)] == expected


def test_minimum_length_of_embeddings(model: Any, references: References, endings: Endings) -> None:
    embeds = torch.cat([references[name].get_input_embeddings()(PROMPT) for name in NAMES]).detach()
    for minimum in ({"min_length": LENGTH + 4}, {"min_new_tokens": 4}):
        output = model.generate(inputs_embeds=embeds, expert=list(NAMES), **GREEDY, **minimum)
        for row, name in enumerate(NAMES):
            expected = references[name].generate(
                inputs_embeds=embeds[row : row + 1], **GREEDY, **minimum, eos_token_id=endings[name], pad_token_id=0
            )
            assert output[row, : expected.shape[1]].tolist() == expected[0].tolist()


def test_explicit_eos_holds_for_all_rows(model: Any, references: References, endings: Endings) -> None:
    eos = endings["math"]
    for how in ({"eos_token_id": eos}, {"generation_config": GenerationConfig(eos_token_id=999, **GREEDY)}):
        stop = how.get("eos_token_id", 999)
        output = model.generate(ROWS, expert=list(NAMES), **how, **(GREEDY if "eos_token_id" in how else {}))
        for row, name in enumerate(NAMES):
            expected = references[name].generate(PROMPT, **GREEDY, eos_token_id=stop, pad_token_id=0)
            assert answer(output[row], stop) == answer(expected[0], stop)


def test_a_config_of_the_callers_own_may_name_a_default_eos(
    model: Any, references: References, endings: Endings
) -> None:
    """A base's EOS is a choice in a config made for the call, but not in a copy of the model's."""
    own = GenerationConfig(eos_token_id=endings[None], **GREEDY)
    copied = copy.deepcopy(model.generation_config)
    copied.update(**GREEDY)
    for config, stop in ((own, endings[None]), (copied, endings["code"])):
        expected = references["code"].generate(PROMPT, **GREEDY, eos_token_id=stop, pad_token_id=0)
        assert torch.equal(model.generate(PROMPT, config, expert="code"), expected)


def test_an_eos_past_the_vocabulary_ends_nothing(model: Any, references: References, endings: Endings) -> None:
    model._meswitch_switch.base_eos_token_id = (endings[None], 500)
    output = model.generate(ROWS, expert=list(NAMES), **GREEDY, min_new_tokens=3)
    expected = expected_answer(references, endings, None, min_new_tokens=3)
    assert answer(output[2], endings[None]) == expected


def test_an_empty_batch(model: Any) -> None:
    with pytest.raises(ValueError, match="no rows"):
        model.generate(PROMPT[:0], expert="math", **GREEDY)


def test_eos_edited_on_the_model_is_explicit(model: Any, references: References) -> None:
    model.generation_config.eos_token_id = 999
    output = model.generate(ROWS, expert=list(NAMES), **GREEDY)
    assert output.shape[1] == LENGTH + GREEDY["max_new_tokens"]


def test_user_criteria_and_processors_are_kept(model: Any) -> None:
    calls = []
    model.generate(
        ROWS,
        expert=list(NAMES),
        **GREEDY,
        logits_processor=[lambda ids, scores: calls.append("processor") or scores],
        stopping_criteria=[lambda ids, scores: calls.append("criterion") or torch.zeros(len(ids), dtype=torch.bool)],
    )
    assert {"processor", "criterion"} == set(calls)


def test_length_penalty_that_names_one_eos_is_refused(model: Any) -> None:
    penalty = (2, 1.5)
    model.generate(PROMPT, expert="math", **GREEDY, exponential_decay_length_penalty=penalty)
    with pytest.raises(UnsupportedOperationError, match="exponential_decay_length_penalty"):
        model.generate(ROWS, expert=list(NAMES), **GREEDY, exponential_decay_length_penalty=penalty)


def test_padding(family: Any, endings: Endings) -> None:
    """The base of ``family`` pads with 0; an id that only "code" knows would be read by the base's finished row."""
    for rows in (["code", None], [None, "code"]):
        with pytest.raises(VocabularyError, match="pad_token_id is 130, but the base knows ids below 128"):
            family.generate(PROMPT.repeat(2, 1), expert=rows, pad_token_id=130, **GREEDY)
    family.generation_config.pad_token_id = None
    experts = family._meswitch_switch.experts
    experts["code"] = dataclasses.replace(experts["code"], pad_token_id=130)
    output = family.generate(PROMPT.repeat(2, 1), expert=[None, "code"], eos_token_id=[129, *range(60)], **GREEDY)
    assert int(output.max()) < 132
    # Alone, "code" pads with its own.
    prompts = torch.tensor([[1, 50, 43, 5, 41], [1, 7, 90, 61, 33]])
    output = family.generate(prompts, expert="code", eos_token_id=list(range(64)), **GREEDY)
    assert 130 in output[:, LENGTH:] or len({len(answer(row)) for row in output}) == 1


def test_an_eos_inside_a_prompt_is_no_padding(model: Any, references: References, endings: Endings) -> None:
    """Without a padding id, transformers pads with the EOS, which chats have at the end of each turn."""
    model.generation_config.pad_token_id = None
    switch = model._meswitch_switch
    for name in ("math", "code"):
        switch.experts[name] = dataclasses.replace(switch.experts[name], pad_token_id=None)
    prompts = PROMPT.repeat(3, 1)
    prompts[:, 2] = endings["math"]
    output = model.generate(prompts, expert=list(NAMES), **GREEDY)
    for row, name in enumerate(NAMES):
        expected = references[name].generate(
            prompts[:1], attention_mask=torch.ones_like(prompts[:1]), **GREEDY, eos_token_id=endings[name]
        )
        assert answer(output[row], endings[name]) == answer(expected[0], endings[name])


def test_stock_loading_takes_over_the_experts_endings(
    ending_family: TinyFamily, references: References, endings: Endings
) -> None:
    model = AutoModelForCausalLM.from_pretrained(ending_family.deltas["code"])
    assert model.generation_config.eos_token_id == endings["code"]
    assert answer(model.generate(PROMPT, **GREEDY)[0]) == expected_answer(references, endings, "code")
    output = model.generate(PROMPT, expert=None, **GREEDY)
    assert answer(output[0]) == expected_answer(references, endings, None)
    model.delete_adapter("default")
    assert answer(model.generate(PROMPT, **GREEDY)[0]) == expected_answer(references, endings, None)


@pytest.mark.parametrize("name", ["math", "code"])
def test_a_merged_model_ends_as_its_expert(
    model: Any, references: References, endings: Endings, tmp_path: Path, name: str
) -> None:
    model.set_expert(name)
    model.merge_and_unload().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert answer(plain.generate(PROMPT, **GREEDY)[0]) == expected_answer(references, endings, name)
    assert plain.config.eos_token_id == endings[name]  # what is read where there is no generation config


def test_the_callers_config_is_neither_changed_nor_warned_of(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = GenerationConfig(**GREEDY)
    before = config.to_dict()
    output = model.generate(ROWS, config, expert=list(NAMES))
    assert torch.equal(output, model.generate(ROWS, expert=list(NAMES), **GREEDY))
    assert config.to_dict() == before
    assert "together with generation-related arguments" not in caplog.text
