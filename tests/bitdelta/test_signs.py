"""Masks to codes and back, over all shapes that the format allows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.bitdelta.conftest import packed, signs
from tests.fixtures_models import dense_delta, unpacked
from transformers_meswitch.bitdelta.diff import Signs
from transformers_meswitch.bitdelta.expert import linear_of

COEFFS = st.floats(2.0**-40, 2.0**40, width=32)


def masks():
    word = st.integers(-(2**31), 2**31 - 1)
    return st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
        lambda shape: st.lists(
            st.lists(word, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        ).map(lambda rows: torch.tensor(rows, dtype=torch.int32))
    )


@given(masks(), COEFFS, st.booleans(), st.booleans())
def test_a_mask_and_its_codes_say_the_same(mask, size, is_negative, is_transposed):
    coeff = -size if is_negative else size
    stored = mask.T.contiguous().T if is_transposed else mask
    record, leaves = linear_of(Signs(stored, coeff))
    expected = signs(mask)
    assert (record.out_features, record.in_features) == expected.shape == (mask.shape[1], 32 * mask.shape[0])
    delta = dense_delta(dataclasses.asdict(record), leaves)
    assert np.array_equal(delta.numpy(), expected.astype(np.float32) * np.float32(coeff))
    codes = unpacked(leaves["codes"], 1, record.in_features).numpy()
    assert torch.equal(packed(codes != is_negative), mask)
    assert leaves["codes"].is_contiguous()


@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**16))
def test_packing_is_undone(out_features, words, seed):
    positive = np.random.default_rng(seed).random((out_features, 32 * words)) < 0.5
    assert np.array_equal(signs(packed(positive)), 2 * positive.astype(int) - 1)


@pytest.mark.parametrize(
    ("row", "channel", "word", "value"), [(0, 0, 0, 1), (1, 5, 0, 32), (2, 31, 0, -(2**31)), (0, 40, 1, 256)]
)
def test_where_one_sign_is(row, channel, word, value):
    """By hand, so that packing and unpacking cannot be wrong together."""
    positive = np.zeros((3, 64), dtype=bool)
    positive[row, channel] = True
    mask = torch.zeros(2, 3, dtype=torch.int32)
    mask[word, row] = value
    assert torch.equal(packed(positive), mask)
    _, leaves = linear_of(Signs(mask, 0.5))
    codes = torch.zeros(3, 8, dtype=torch.uint8)
    codes[row, channel // 8] = 1 << (channel % 8)
    assert torch.equal(leaves["codes"], codes)
    assert leaves["step"].tolist() == [1.0] * 3
