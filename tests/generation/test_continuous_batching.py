"""Continuous batching: one expert a manager, the same answers as of ``generate``, and no cache of another expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from tests.fixtures_models import TinyFamily
from tests.generation.conftest import NAMES, PROMPT
from transformers_meswitch import MESwitchModelForCausalLM, continuous_batching
from transformers_meswitch.errors import ExpertNotFoundError, UnsupportedOperationError, VocabularyError

LENGTH = 8
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": LENGTH}
NO_EOS: dict[str, Any] = {"eos_token_id": 999, "pad_token_id": 0}
#: One whole block of the cache and more, so that a prompt seen before is not computed again.
LONG = torch.arange(3, 83)
#: Small, as the default takes most of the machine's memory; two prompts' worth of blocks.
SMALL: dict[str, Any] = {"num_blocks": 16, "max_batch_tokens": 128}
# Releases of transformers differ in what they call the tokens of a block.
SMALL[next(f.name for f in dataclasses.fields(ContinuousBatchingConfig) if f.name in ("page_size", "block_size"))] = 32
INPUTS = [PROMPT[0].tolist(), LONG.tolist()]


def batching() -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**SMALL)


def config(**more: Any) -> GenerationConfig:
    return GenerationConfig(**{**GREEDY, **NO_EOS, **more})


def tokens(results: dict[str, Any]) -> list[list[int]]:
    return [result.generated_tokens for result in results.values()]


def answers(manager: Any, count: int) -> list[list[int]]:
    found = {result.request_id: result for result in (manager.get_result(timeout=30) for _ in range(count))}
    assert [result.error for result in found.values()] == [None] * count
    return tokens(dict(sorted(found.items())))


@pytest.fixture(scope="module")
def expected(references: dict[str | None, Any]) -> dict[str | None, list[list[int]]]:
    """What stock models answer to ``INPUTS``, each prompt by itself."""
    asked = [torch.tensor([ids]) for ids in INPUTS]
    found = {
        name: [model.generate(ids, **GREEDY, **NO_EOS)[0, ids.shape[1] :].tolist() for ids in asked]
        for name, model in references.items()
    }
    assert len({str(answer) for answer in found.values()}) == len(NAMES)
    return found


@pytest.fixture
def family(family: Any) -> Iterator[Any]:
    yield family
    family.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_by_one_expert(family: Any, expected: Any, name: str | None) -> None:
    assert tokens(family.generate_batch(INPUTS, config(), batching(), expert=name)) == expected[name]
    assert tokens(family.generate_batch(INPUTS, config(expert=name), batching())) == expected[name]
    assert tokens(family.generate_batch(INPUTS, config(), batching(), expert=[name, name])) == expected[name]
    paged = family.generate(
        PROMPT, expert=name, continuous_batching_config=batching(), cache_implementation="paged", **GREEDY, **NO_EOS
    )
    assert paged[0, 0, PROMPT.shape[1] :].tolist() == expected[name][0]
    family.generation_config.expert = name
    assert tokens(family.generate_batch(INPUTS, config(), batching())) == expected[name]
    del family.generation_config.expert
    family.set_expert(name)
    assert tokens(family.generate_batch(INPUTS, config(), batching())) == expected[name]
    assert family.generate_batch([], config(), expert=name) == {}


def test_no_manager_replays_what_would_follow_other_choices(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are kernels graphs and compiled code read the choice of the time when they run."""
    warned: list[str] = []
    monkeypatch.setattr(continuous_batching.logger, "warning_once", warned.append)
    asked = ContinuousBatchingConfig(**SMALL, varlen_compile_config=CompileConfig())
    manager = family.init_continuous_batching(config(expert="math"), asked)
    assert manager.continuous_batching_config.varlen_compile_config is not None  # without kernels each expert's own
    assert not warned
    family._meswitch_switch.live_on(torch.device("cpu"))
    for graphs in (False, True):
        manager = family.init_continuous_batching(config(expert="math"), asked)
        resolved = manager.continuous_batching_config
        if graphs:
            resolved.use_cuda_graph, resolved.use_async_batching = (True, True), True
            continuous_batching._call_as_written(resolved)
        assert resolved.cuda_graph_booleans == (False, False)
        assert not resolved.use_async_batching
        assert resolved.varlen_compile_config is None
        assert asked.varlen_compile_config is not None
    assert len(warned) == 3
    manager.start()
    manager.add_request(INPUTS[0])
    assert manager.get_result(timeout=60).error is None
    manager.stop(block=True)


def test_answers_end_at_the_experts_own_eos(ending_family: TinyFamily, endings: Any) -> None:
    family = MESwitchModelForCausalLM.from_pretrained(ending_family.base, experts=dict(ending_family.deltas))
    for name in NAMES:
        alone = family.generate(PROMPT, expert=name, do_sample=False, max_new_tokens=24)[0, PROMPT.shape[1] :].tolist()
        assert alone[-1] == endings[name]
        greedy = GenerationConfig(do_sample=False, max_new_tokens=24)
        assert tokens(family.generate_batch([INPUTS[0]], greedy, batching(), expert=name)) == [alone]
        paged = family.generate(
            PROMPT,
            expert=name,
            continuous_batching_config=batching(),
            cache_implementation="paged",
            do_sample=False,
            max_new_tokens=24,
        )
        assert paged[0, 0, PROMPT.shape[1] :].tolist() == alone
        other = next(endings[n] for n in NAMES if n != name)
        stated = family.generate(
            PROMPT,
            expert=name,
            continuous_batching_config=batching(),
            cache_implementation="paged",
            eos_token_id=other,
            do_sample=False,
            max_new_tokens=24,
        )
        assert stated.shape[-1] - PROMPT.shape[1] > len(alone) or other in alone


def test_a_manager_keeps_its_expert(family: Any, expected: Any) -> None:
    """Were the second request answered by another expert, it would read the first one's cached prefix."""
    family.set_expert("math")
    with family.continuous_batching_context_manager(config(), continuous_batching_config=batching()) as manager:
        manager.add_request(INPUTS[1])
        assert answers(manager, 1) == expected["math"][1:]
        family.set_expert("code")
        manager.add_request(INPUTS[1])
        assert answers(manager, 1) == expected["math"][1:]
        family.disable_adapters()
        manager.add_request(INPUTS[1])
        assert answers(manager, 1) == expected["math"][1:]
    family.set_expert("code")
    assert tokens(family.generate_batch(INPUTS, config(), batching())) == expected["code"]


def test_a_persistent_manager_serves_no_other_expert(family: Any, expected: Any, tiny_family: TinyFamily) -> None:
    keep = {"persistent_manager": True, "continuous_batching_config": batching()}
    for _ in range(2):
        assert tokens(family.generate_batch(INPUTS, config(), expert="math", **keep)) == expected["math"]
    with pytest.raises(UnsupportedOperationError, match=r"'math'.*'code'.*destroy_cached"):
        family.generate_batch(INPUTS, config(), expert="code", **keep)
    family.delete_adapter("math")
    family.load_adapter(str(tiny_family.deltas["code"]), adapter_name="math")
    with pytest.raises(UnsupportedOperationError, match="destroy_cached"):
        family.generate_batch(INPUTS, config(), expert="math", **keep)
    family.destroy_cached_continuous_batching_manager()
    assert tokens(family.generate_batch(INPUTS, config(), expert="math", **keep)) == expected["code"]


def test_merging_under_a_manager_fails_its_requests(family: Any) -> None:
    with family.continuous_batching_context_manager(
        config(expert=None), continuous_batching_config=batching()
    ) as manager:
        family.set_expert("math")
        family.merge_adapter()
        manager.add_request(INPUTS[0])
        result = manager.get_result(timeout=30)
        assert "'math' is merged" in result.error
    family.unmerge_adapter()


def test_what_cannot_be_batched(family: Any) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"'math' and the base together"):
        family.generate_batch(INPUTS, config(), expert=["math", None])
    with pytest.raises(UnsupportedOperationError, match=r"'math' and expert 'code' together"):
        family.generate(
            PROMPT.repeat(2, 1),
            expert=["math", "code"],
            continuous_batching_config=batching(),
            cache_implementation="paged",
            **GREEDY,
        )
    with pytest.raises(UnsupportedOperationError, match="no adapter_names"):
        family.generate_batch(INPUTS, config(), adapter_names=["math", "math"])
    with pytest.raises(ExpertNotFoundError, match="'poet'"):
        family.generate_batch(INPUTS, config(), expert="poet")
    with pytest.raises(ExpertNotFoundError, match="'poet'"):
        family.init_continuous_batching(config(expert="poet"))
    with pytest.raises(ValueError, match="3 experts were named for 2 rows"):
        family.generate_batch(INPUTS, config(), expert=["math"] * 3)
    with pytest.raises(VocabularyError, match=r"Row 1 holds token id 130.*'math' knows ids below 128"):
        family.generate_batch([[1, 2], [1, 130]], config(), expert="math")
    assert tokens(family.generate_batch([[1, 130]], config(), batching(), expert="code"))
    with pytest.raises(VocabularyError, match=r"Row 0 holds token id 130"):
        family.generate(
            torch.tensor([[130, 1, 2]]), attention_mask=torch.tensor([[0, 1, 1]]), cache_implementation="paged"
        )
