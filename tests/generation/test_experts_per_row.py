"""Which expert answers a row: the call, the generation config, the sticky choice; alone and mixed."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.fixtures_models import TinyFamily
from tests.generation.conftest import NAMES, PROMPT
from tests.generation.equality import same_answer
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.errors import ExpertNotFoundError, UnsupportedOperationError

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}
NO_EOS: dict[str, Any] = {"eos_token_id": 999, "pad_token_id": 0}
PROMPTS = torch.tensor([[1, 50, 43, 5, 41], [1, 7, 90, 61, 33], [1, 100, 40, 8, 127], [1, 50, 43, 5, 41]])


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_by_name(family: Any, references: dict[str | None, Any], name: str | None) -> None:
    expected = references[name].generate(PROMPT, **GREEDY, **NO_EOS)
    found = family.generate(PROMPT, expert=name, **GREEDY, **NO_EOS)
    assert same_answer(references[name], expected[0], found[0])
    for other in set(NAMES) - {name}:
        wrong = family.generate(PROMPT, expert=other, **GREEDY, **NO_EOS)
        assert not same_answer(references[name], expected[0], wrong[0])


@pytest.mark.parametrize("rows", [["math", "code", None, "code"], ["math"] * 4, [None, None, None, "math"]])
def test_mixed_rows_equal_rows_alone(family: Any, references: dict[str | None, Any], rows: list[str | None]) -> None:
    found = family.generate(PROMPTS, expert=rows, **GREEDY, **NO_EOS)
    for row, name in enumerate(rows):
        expected = references[name].generate(PROMPTS[row : row + 1], **GREEDY, **NO_EOS)
        assert same_answer(references[name], expected[0], found[row])
    assert family.active_adapters() == []


def test_left_padded_rows_of_different_lengths(family: Any, references: dict[str | None, Any]) -> None:
    prompts = torch.tensor([[0, 0, 1, 50, 43], [1, 7, 90, 61, 33], [0, 0, 0, 1, 40]])
    mask = (prompts != 0).long()
    for given in ({"attention_mask": mask}, {}):  # transformers finds the padding by itself
        found = family.generate(prompts, expert=list(NAMES), **GREEDY, **given)
        for row, name in enumerate(NAMES):
            alone = prompts[row, mask[row].bool()][None]
            expected = references[name].generate(alone, **GREEDY, eos_token_id=129 if name == "code" else 2)
            assert same_answer(references[name], expected[0], found[row, -(alone.shape[1] + 10) :])


def test_mixed_rows_in_bfloat16(tiny_family: TinyFamily) -> None:
    family = MESwitchModelForCausalLM.from_pretrained(
        tiny_family.base, experts=dict(tiny_family.deltas), dtype=torch.bfloat16
    )
    with torch.no_grad(), family._meswitch_switch.rows(NAMES):
        mixed = family(PROMPT.repeat(3, 1)).logits
    for row, name in enumerate(NAMES):
        family.set_expert(name)
        with torch.no_grad():
            alone = family(PROMPT).logits[0]
        known = family._meswitch_switch.vocab_size(name)
        # Two roundings of bfloat16's 8 bits, on logits of the order of 10.
        torch.testing.assert_close(mixed[row, :, :known], alone[:, :known], atol=0.1, rtol=2**-6)
        assert torch.isneginf(mixed[row, :, known:]).all()


def test_precedence(family: Any, references: dict[str | None, Any]) -> None:
    def answers(name: str | None, **kwargs: Any) -> bool:
        expected = references[name].generate(PROMPT, **GREEDY, **NO_EOS)
        found = family.generate(PROMPT, **kwargs, **NO_EOS, **({} if "generation_config" in kwargs else GREEDY))
        return same_answer(references[name], expected[0], found[0])

    assert answers(None)
    family.set_expert("math")
    assert answers("math")
    family.generation_config.expert = "code"
    assert answers("code")
    config = GenerationConfig(expert="math", **GREEDY)
    assert answers("math", generation_config=config)
    assert answers(None, generation_config=GenerationConfig(expert=None, **GREEDY))
    assert answers("code", generation_config=config, expert="code")
    assert answers(None, generation_config=config, expert=None)
    assert answers(None, expert="__base__")
    assert answers(None, expert="base")
    assert family.active_adapters() == ["math"]


def test_generation_config_keeps_its_expert_on_disk(family: Any, tmp_path: Any) -> None:
    family.generation_config.expert = "code"
    family.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(PROMPT, **GREEDY), family.generate(PROMPT, expert="code", **GREEDY))


def test_what_cannot_be_answered(family: Any) -> None:
    with pytest.raises(ValueError, match="2 experts were named for 1 rows"):
        family.generate(PROMPT, expert=["math", "code"], **GREEDY)
    with pytest.raises(ExpertNotFoundError, match=r"'poet'.*'math', 'code'"):
        family.generate(PROMPT, expert="poet", **GREEDY)
    for name in (3, [3], object()):
        with pytest.raises(ExpertNotFoundError, match="No expert named"):
            family.generate(PROMPT, expert=name, **GREEDY)
    array, listed = (family.generate(PROMPT, expert=e, **GREEDY) for e in (np.array(["math"]), ["math"]))
    assert torch.equal(array, listed)
    for auto in ("auto", ["auto"]):
        with pytest.raises(UnsupportedOperationError, match="router"):
            family.generate(PROMPT, expert=auto, **GREEDY)


def test_disabled_adapters(family: Any, references: dict[str | None, Any]) -> None:
    family.set_expert("math")
    family.disable_adapters()
    expected = references[None].generate(PROMPT, **GREEDY, **NO_EOS)
    assert same_answer(references[None], expected[0], family.generate(PROMPT, **GREEDY, **NO_EOS)[0])
    assert same_answer(references[None], expected[0], family.generate(PROMPT, expert=None, **GREEDY, **NO_EOS)[0])
    with pytest.raises(UnsupportedOperationError, match="disabled"):
        family.generate(PROMPT, expert="math", **GREEDY)
    family.generation_config.expert = "code"  # a default, not a wish
    assert same_answer(references[None], expected[0], family.generate(PROMPT, **GREEDY, **NO_EOS)[0])


def test_threads_do_not_mix(family: Any) -> None:
    alone = {name: family.generate(PROMPT, expert=name, **GREEDY) for name in NAMES}
    found: list[tuple[str | None, torch.Tensor]] = []

    def ask(name: str | None) -> None:
        found.extend((name, family.generate(PROMPT, expert=name, **GREEDY)) for _ in range(3))

    threads = [threading.Thread(target=ask, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(answer, alone[name]) for name, answer in found)
