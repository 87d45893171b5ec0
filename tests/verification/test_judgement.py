"""What is said of which numbers."""

from __future__ import annotations

import math

import pytest

from tests.verification.records import evidence
from transformers_meswitch.verification.evidence import WeightEvidence
from transformers_meswitch.verification.judgement import bits_that_fit


def test_a_faithful_delta():
    judgement = evidence().judgement
    assert evidence().too_far is False
    assert judgement.startswith("The delta stands for the expert")
    assert "99.2% of what the fine-tune changed" in judgement
    assert "98.0% of the tokens" in judgement


@pytest.mark.parametrize(
    ("figures", "too_far"),
    [
        ({"kl": 0.025, "kl_base": 0.5}, False),
        ({"kl": 0.026, "kl_base": 0.5}, True),  # more than 5 % of the way is left
        ({"kl": 0.01, "kl_base": 0.05}, False),  # negligible whatever its share
        ({"kl": 0.011, "kl_base": 0.05}, True),
        ({"kl": 0.11, "kl_base": 9.0}, True),  # too much whatever its share
        ({"kl": 0.02, "top1_agreement": 0.89}, True),
        ({"kl": 0.009, "top1_agreement": 0.5}, False),  # ties change hands at random text
        ({"kl": math.inf}, True),
    ],
)
def test_the_limits(figures, too_far):
    record = evidence(**figures)
    assert record.too_far is too_far
    assert ("too far from its base" in record.judgement) is (too_far and record.text.kl < record.text.kl_base)


def test_too_far_names_the_bits_and_a_cure():
    assert "too far from its base for 1 bit:" in evidence(bits=1, kl=0.06).judgement
    # 0.06 nats at 1 bit, a third of it at 2 bits: below 5 % of 0.5.
    assert "Compress it again with 2 bits" in evidence(bits=1, kl=0.06).judgement
    assert "Compress it again with 3 bits" in evidence(bits=1, kl=0.15).judgement
    assert "even 4 bits are too few" in evidence(bits=3, kl=0.3).judgement
    assert "more salient channels" in evidence(bits=4, kl=0.03).judgement


def test_bits_of_a_mixed_delta():
    text = evidence(kl=0.06).text
    # Half the weights at 1 bit and half at 4 leave about half the energy of 1 bit: 3 bits are needed for 1/2.4 of it.
    mixed = WeightEvidence({}, {"1": 500, "4": 500})
    assert bits_that_fit(mixed, text) == 3
    assert bits_that_fit(WeightEvidence({}, {}), text) is None


@pytest.mark.parametrize(
    "record",
    [
        evidence(kl=0.6),
        evidence(text=False, errors=(1.2, 1.4, 0.3), bits=2),
        evidence(text=False, errors=(1.0,), bits=2),
        evidence(text=False, errors=(1.4,), bits=1),
    ],
)
def test_a_delta_of_something_else(record):
    assert "no nearer to this expert" in record.judgement


def test_one_bit_codes_may_be_far_off_in_weights_and_text_decides_where_there_is_some():
    assert "no nearer" not in evidence(text=False, errors=(1.1, 1.2), bits=1).judgement
    assert "stands for the expert" in evidence(kl=0.001, errors=(1.2, 1.4, 0.3), bits=2).judgement


def test_without_text_nothing_is_said_of_answers():
    assert evidence(text=False).too_far is None
    assert "give text" in evidence(text=False).judgement


def test_text_on_which_the_fine_tune_changed_nothing():
    assert "says little about the delta" in evidence(kl=0.0, kl_base=0.0).judgement
