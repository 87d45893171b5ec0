"""A quantised linear: its record, its tensors, and what they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_meswitch.compression.linear import compress_linear, reconstruct_linear
from transformers_meswitch.errors import CompressionError


def announced(record):
    names = {"U8": torch.uint8, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16}
    return {leaf: (names[dtype], shape) for leaf, (dtype, shape) in record.leaves().items()}


@given(
    bits=st.integers(1, 4),
    salient=st.integers(0, 12),
    width=st.integers(1, 11),
    rows=st.integers(1, 6),
    columns=st.booleans(),
    weighted=st.booleans(),
)
@settings(max_examples=80)
def test_tensors_are_what_the_record_announces(by_hand, bits, salient, width, rows, columns, weighted):
    generator = torch.Generator().manual_seed(width * 100 + rows)
    delta = torch.randn(rows, width, generator=generator)
    moment = torch.rand(width, generator=generator) if weighted else None
    stored = compress_linear(delta, bits, salient, moment, columns)
    assert stored.record.salient_channels == min(salient, width)
    assert {leaf: (t.dtype, tuple(t.shape)) for leaf, t in stored.tensors.items()} == announced(stored.record)
    found = reconstruct_linear(stored.record, stored.tensors)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), by_hand(stored.record, stored.tensors), rtol=1e-5)


def test_the_by_hand_check_notices_a_moved_channel(by_hand):
    stored = compress_linear(torch.randn(4, 12, generator=torch.Generator().manual_seed(0)), 2, 3)
    moved = stored.tensors | {"salient_index": stored.tensors["salient_index"] - 1}
    assert not np.allclose(reconstruct_linear(stored.record, moved).numpy(), by_hand(stored.record, stored.tensors))


def test_salient_channels_are_the_worst_and_their_columns_the_deltas():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(32, 400, generator=generator) * 0.1
    delta[:, 13] *= 20
    delta[:, 4] *= 30
    stored = compress_linear(delta, 2, 2)
    assert stored.tensors["salient_index"].tolist() == [4, 13]
    assert torch.equal(stored.tensors["salient"], delta[:, [4, 13]].to(torch.bfloat16))
    # inputs that hardly use channel 4 and use channel 9 hard change the choice
    moment = torch.ones(400)
    moment[4], moment[9] = 1e-9, 1e5
    assert compress_linear(delta, 2, 2, moment).tensors["salient_index"].tolist() == [9, 13]


def test_steps_are_fitted_again_without_the_salient_channels():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(8, 20, generator=generator)
    delta[:, 5] = 100
    rest = torch.cat([delta[:, :5], delta[:, 6:]], dim=1)
    stored = compress_linear(delta, 1, 1)
    torch.testing.assert_close(stored.tensors["step"], 2 * rest.abs().mean(1))
    assert not torch.allclose(stored.tensors["step"], 2 * delta.abs().mean(1), rtol=0.1)


def test_all_channels_salient():
    delta = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    stored = compress_linear(delta, 2, 16)
    assert stored.tensors["codes"].shape == (3, 0)
    assert stored.tensors["step"].tolist() == [0.0] * 3
    assert torch.equal(reconstruct_linear(stored.record, stored.tensors), delta.to(torch.bfloat16).float())


def test_zero_rows_are_exact_and_a_zero_layer_too():
    delta = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    delta[1] = 0
    for columns in (False, True):
        stored = compress_linear(delta, 2, 0, column_steps=columns)
        assert reconstruct_linear(stored.record, stored.tensors)[1].tolist() == [0.0] * 9
    stored = compress_linear(torch.zeros(3, 9), 3, 2)
    assert not stored.tensors["step"].any()
    assert not stored.tensors["codes"].any()
    assert not reconstruct_linear(stored.record, stored.tensors).any()


def test_more_bits_and_more_salient_channels_lose_less():
    delta = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

    def error(*settings, **more):
        stored = compress_linear(delta, *settings, **more)
        return float((reconstruct_linear(stored.record, stored.tensors) - delta).square().sum())

    assert error(1, 0) > error(2, 0) > error(3, 0) > error(4, 0)
    assert error(2, 0) > error(2, 4) > error(2, 16)
    assert error(2, 4) > error(2, 4, column_steps=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_refused_with_its_place(value):
    delta = torch.zeros(3, 4)
    delta[1, 2] = value
    with pytest.raises(CompressionError, match=rf"is {value} at \[1, 2\]"):
        compress_linear(delta, 2, 1)
    with pytest.raises(CompressionError, match="second moment"):
        compress_linear(torch.ones(3, 4), 2, 1, delta[1])


def test_wrong_shapes_are_refused():
    with pytest.raises(CompressionError, match=r"second moment has shape \(3,\), expected \[4\]"):
        compress_linear(torch.ones(3, 4), 2, 1, torch.ones(3))
    with pytest.raises(CompressionError, match=r"shape \(4,\), expected \[out, in\]"):
        compress_linear(torch.ones(4), 2, 1)


def test_the_remaining_channels_keep_their_own_second_moments():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(8, 20, generator=generator)
    delta[:, 2] = 100
    moment = torch.rand(20, generator=generator) + 0.1
    rest = [i for i in range(20) if i != 2]
    stored = compress_linear(delta, 1, 1, moment)
    expected = 2 * (moment[rest] * delta[:, rest].abs()).sum(1) / moment[rest].sum()
    torch.testing.assert_close(stored.tensors["step"], expected)


def whole(diagonal):
    return torch.diag(diagonal)


@pytest.mark.parametrize("moments", [lambda m: m, whole])
def test_a_change_in_a_channel_that_calibration_never_saw_is_not_lost(moments):
    moment = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    delta = torch.zeros(3, 5)
    delta[:, 0] = torch.tensor([1.0, -2.0, 3.0])
    stored = compress_linear(delta, 2, 1, moments(moment))
    assert stored.tensors["salient_index"].tolist() == [0]
    assert torch.equal(reconstruct_linear(stored.record, stored.tensors), delta)
    assert bool((compress_linear(delta, 2, 0, moments(moment)).tensors["step"] > 0).all())


def test_a_silent_channel_takes_nothing_from_the_others():
    generator = torch.Generator().manual_seed(0)
    delta, moment = torch.randn(8, 40, generator=generator), torch.rand(40, generator=generator) + 0.5
    moment[7] = 0
    step = compress_linear(delta, 2, 0, moment).tensors["step"]
    seen = [i for i in range(40) if i != 7]
    torch.testing.assert_close(
        step, compress_linear(delta[:, seen], 2, 0, moment[seen]).tensors["step"], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("moments", [lambda m: m, whole])
def test_overflowing_activations_are_not_blamed_on_the_weights(moments):
    moment = torch.tensor([1.0, float("inf"), 1.0, 1.0])
    with pytest.raises(CompressionError, match=r"is inf at \[1.*activations overflow on the calibration text"):
        compress_linear(torch.ones(3, 4), 2, 1, moments(moment).nan_to_num(0.0, posinf=float("inf")))


def test_a_delta_that_overflows_the_format_is_refused_as_such():
    delta = torch.ones(3, 4)
    delta[0, 0] = 3.4e38
    with pytest.raises(
        CompressionError, match=r"delta reaches 3\.4e\+38, for which salient overflows torch\.bfloat16"
    ):
        compress_linear(delta, 2, 1)
