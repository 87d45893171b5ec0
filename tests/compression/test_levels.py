"""Levels and rounding against their definition, one scalar at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_meswitch.compression.levels import code_values, dequantize, dequantize_packed, quantize
from transformers_meswitch.compression.packing import pack


def test_code_values_are_mid_rise():
    assert code_values(1).tolist() == [-0.5, 0.5]
    assert code_values(2).tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert code_values(3).tolist() == [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]
    for bits in (1, 2, 3, 4):
        values = code_values(bits)
        assert values.dtype == torch.float32
        assert len(values) == 2**bits
        assert torch.equal(values, -values.flip(0))


def nearest(delta, step, bits, column_step):
    """For each element, the smallest distance to any level."""
    levels = (2 * np.arange(2**bits) + 1 - 2**bits) / 2
    grid = levels * (step[:, None, None] * column_step[None, :, None])
    return np.abs(delta[:, :, None] - grid).min(-1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [False, True])
def test_quantize_takes_the_nearest_level(bits, columns):
    generator = torch.Generator().manual_seed(bits)
    delta = torch.randn(5, 33, generator=generator)
    step = torch.rand(5, generator=generator) + 0.1
    column_step = torch.rand(33, generator=generator) + 0.5 if columns else None
    codes = quantize(delta, step, bits, column_step)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    distance = (delta - dequantize(codes, step, bits, column_step)).abs().numpy()
    factor = np.ones(33) if column_step is None else column_step.double().numpy()
    expected = nearest(delta.double().numpy(), step.double().numpy(), bits, factor)
    np.testing.assert_allclose(distance, expected, atol=1e-5)
    neighbour = torch.where(codes > 0, codes - 1, codes + 1)
    wrong = (delta - dequantize(neighbour, step, bits, column_step)).abs().numpy()
    assert not np.allclose(wrong, expected, atol=1e-5)


def test_zero_steps_give_code_zero_and_value_zero():
    delta = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    step = torch.tensor([0.0, 2.0])
    codes = quantize(delta, step, 2)
    assert codes.tolist() == [[0, 0], [2, 1]]
    assert dequantize(codes, step, 2).tolist() == [[0.0, 0.0], [1.0, -1.0]]
    by_column = quantize(delta, step, 2, torch.tensor([0.0, 1.0]))
    assert by_column.tolist() == [[0, 0], [0, 1]]
    assert dequantize(by_column, step, 2, torch.tensor([0.0, 1.0])).tolist() == [[0.0, 0.0], [0.0, -1.0]]


@given(
    bits=st.sampled_from([1, 2, 3, 4]),
    out=st.integers(0, 5),
    n=st.integers(0, 67),
    column=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dequantising_packed_codes_is_unpacking_and_dequantising(bits, out, n, column, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (out, n), dtype=torch.uint8, generator=generator)
    step = torch.rand(out, generator=generator)
    columns = torch.rand(n, generator=generator) if column else None
    expected = dequantize(codes, step, bits, columns)
    assert torch.equal(dequantize_packed(pack(codes, bits), step, bits, n, columns), expected)
    if expected.numel():
        wrong = pack((codes + 1) % 2**bits, bits)
        assert not torch.equal(
            dequantize_packed(wrong, step + 1, bits, n, columns), dequantize(codes, step + 1, bits, columns)
        )
