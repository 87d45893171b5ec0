"""Correctness as bits, paired intervals, KL and agreement: against direct computations."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import benchmarks.quality
from benchmarks.quality.measures import difference_interval, divergence, from_bits, reference_states, to_bits


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(right):
    text = to_bits(right)
    assert from_bits(text, len(right)) == right
    assert len(text) == -(-len(right) // 4)
    assert sum(bin(int(digit, 16)).count("1") for digit in text) == sum(right)


def test_the_interval_is_of_paired_differences():
    expert = [True, True, False, True, False, True, True, True]
    method = [True, False, True, True, False, False, True, True]
    differences = [int(a) - int(b) for a, b in zip(expert, method, strict=True)]
    mean, half = difference_interval(expert, method)
    assert mean == pytest.approx(statistics.mean(differences))
    assert half == pytest.approx(1.96 * statistics.stdev(differences) / len(differences) ** 0.5, abs=1e-6)
    assert difference_interval(expert, expert) == (0.0, 0.0)
    with pytest.raises(ValueError, match="argument"):
        difference_interval(expert, method[:-1])


def test_divergence_is_kl_and_the_share_of_equal_predictions():
    torch.manual_seed(0)
    states, other = torch.randn(3000, 8), torch.randn(3000, 8)
    head, other_head = torch.randn(20, 8), torch.randn(20, 8)
    p, q = torch.softmax(states @ head.T, 1), torch.softmax(other @ other_head.T, 1)
    found = divergence(states, head, other, other_head)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))
    assert found.positions == 3000
    same = divergence(states, head, states, head)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1


def test_states_are_those_that_predict_the_references(pair):
    inputs = pair.inputs
    found = reference_states(inputs.model, inputs.sequences[:3], batch_size=3)
    expected = []
    for ids, prompt in sorted(inputs.sequences[:3], key=lambda sequence: len(sequence[0])):
        with torch.no_grad():
            hidden = inputs.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        expected.append(hidden[prompt - 1 : len(ids) - 1])
    torch.testing.assert_close(found, torch.cat(expected), rtol=2e-2, atol=2e-2)


def test_the_examples_in_docstrings_are_right():
    for module in pkgutil.walk_packages(benchmarks.quality.__path__, "benchmarks.quality."):
        if not module.name.endswith("__main__"):
            failed, _ = doctest.testmod(importlib.import_module(module.name))
            assert not failed, module.name
