"""Packing against an independent reference: a row as a string of bits, in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_meswitch.compression.packing import pack, unpack
from transformers_meswitch.errors import CompressionError, DeltaFormatError

BITS = (1, 2, 3, 4)


def reference_bytes(row: list[int], bits: int, *, lowest_bit_first: bool = True) -> list[int]:
    """The row's bytes by the format's words: bit k of the stream is bit k % 8 of byte k // 8."""
    stream = ""
    for code in row:
        binary = format(code, f"0{bits}b")
        stream += binary[::-1] if lowest_bit_first else binary
    stream += "0" * (-len(stream) % 8)
    return [int(stream[k : k + 8][::-1], 2) for k in range(0, len(stream), 8)]


@st.composite
def codes_of_some_bits(draw):
    bits = draw(st.sampled_from(BITS))
    width = draw(st.integers(0, 70))
    rows = draw(st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=width, max_size=width), max_size=4))
    return bits, width, rows


@given(codes_of_some_bits())
@settings(max_examples=150)
def test_round_trip_and_reference_bytes(case):
    bits, width, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8).view(len(rows), width)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(rows), -(-width * bits // 8))
    assert packed.tolist() == [reference_bytes(row, bits) for row in rows]
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 1, 1], 1, [0b1000_0001, 0b1]),
        ([0, 1, 2, 3, 3], 2, [0b11_10_01_00, 0b11]),
        # from the highest bit: 000 111 110 101 100 011 010 001
        ([1, 2, 3, 4, 5, 6, 7, 0, 7], 3, [0b11_010_001, 0b0_101_100_0, 0b000_111_11, 0b111]),
        ([0xA, 0x5, 0xF], 4, [0x5A, 0x0F]),
    ],
)
def test_exact_bytes(codes, bits, expected):
    assert pack(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [expected]


@pytest.mark.parametrize("bits", BITS)
def test_reference_tells_bit_orders_apart(bits):
    """Were the order of bits wrong, the comparison above would fail."""
    row = [1, 0, 2**bits - 1, 1, 0]
    other = reference_bytes(row, bits, lowest_bit_first=False)
    packed = pack(torch.tensor([row], dtype=torch.uint8), bits).tolist()[0]
    assert (packed == other) == (bits == 1)
    assert packed != reference_bytes(row[::-1], bits)


def test_pad_bits_are_zero():
    for bits in BITS:
        width = 7
        packed = pack(torch.full((1, width), 2**bits - 1, dtype=torch.uint8), bits)
        assert sum(int(byte).bit_count() for byte in packed[0]) == width * bits


def test_bad_codes_are_refused():
    with pytest.raises(CompressionError, match="a code is 4, expected below 4 for 2 bits"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(CompressionError, match="bits is 5"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 5)
    with pytest.raises(CompressionError, match="int64"):
        pack(torch.tensor([[1]]), 2)


def test_bad_bytes_are_refused():
    with pytest.raises(DeltaFormatError, match=r"shape \(1, 2\), expected uint8 \[out, 3\] for 9 codes of 2 bits"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 2, 9)
    with pytest.raises(DeltaFormatError, match="bits is 8"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 8, 2)
