"""Sums over tokens, against the definitions spelled out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_meswitch.verification.fidelity import Fidelity, perplexity


def by_definition(reference, model, targets):
    kl = nll_reference = nll_model = 0.0
    agreements = 0
    for row, target in enumerate(targets.tolist()):
        p = torch.softmax(reference[row].double(), 0).tolist()
        q = torch.softmax(model[row].double(), 0).tolist()
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        agreements += p.index(max(p)) == q.index(max(q))
        nll_reference -= math.log(p[target])
        nll_model -= math.log(q[target])
    return kl, agreements, nll_reference, nll_model


def sums(fidelity):
    return fidelity.kl, fidelity.agreements, fidelity.reference_nll, fidelity.model_nll


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(2, 9), st.floats(0.01, 10))
def test_sums_are_the_definitions(seed, positions, vocabulary, scale):
    generator = torch.Generator().manual_seed(seed)
    reference, model = (scale * torch.randn(positions, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    fidelity = Fidelity()
    fidelity.add(reference, model, targets)
    assert sums(fidelity) == pytest.approx(by_definition(reference, model, targets), rel=1e-5, abs=1e-5)
    assert fidelity.tokens == positions


def test_pieces_add_up():
    reference, model, targets = torch.randn(9, 5), torch.randn(9, 5), torch.randint(5, (9,))
    whole, parts = Fidelity(), Fidelity()
    whole.add(reference, model, targets)
    for part in (slice(0, 4), slice(4, 4), slice(4, 9)):
        parts.add(reference[part], model[part], targets[part])
    assert sums(parts) == pytest.approx(sums(whole))
    assert parts.tokens == whole.tokens == 9


def test_the_direction_is_from_the_reference():
    sharp, flat = torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)
    there, back = Fidelity(), Fidelity()
    there.add(sharp, flat, torch.tensor([0]))
    back.add(flat, sharp, torch.tensor([0]))
    assert there.mean_kl == pytest.approx(math.log(3), rel=1e-2)
    assert back.mean_kl > 3 * there.mean_kl


def test_tokens_that_are_excluded():
    reference = torch.tensor([[0.0, 0.0, -math.inf]])
    same, without, wrong = (torch.tensor([row]) for row in ([0.0, 0.0, -math.inf], [0.0, 0, 0], [0, -math.inf, 0]))
    for model, expected in ((same, 0.0), (without, math.log(3 / 2)), (wrong, math.inf)):
        fidelity = Fidelity()
        fidelity.add(reference, model, torch.tensor([0]))
        assert fidelity.mean_kl == pytest.approx(expected, abs=1e-6)


def test_half_precision_logits_are_compared_in_float32():
    reference, model = torch.randn(8, 1000).bfloat16(), torch.randn(8, 1000).bfloat16()
    targets = torch.randint(1000, (8,))
    half, single = Fidelity(), Fidelity()
    half.add(reference, model, targets)
    single.add(reference.float(), model.float(), targets)
    assert sums(half) == sums(single)


def test_rounding_makes_no_divergence_negative_and_hides_no_nan():
    assert Fidelity(tokens=2, kl=-1e-9).mean_kl == 0.0
    assert math.isnan(Fidelity(tokens=2, kl=math.nan).mean_kl)


def test_a_perplexity_beyond_floats_is_infinite():
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(math.nan, 1))
