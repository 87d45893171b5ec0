"""``docs/delta_format.md`` says what the code does."""

from __future__ import annotations

import dataclasses
import json
import re
from math import prod
from pathlib import Path

import pytest
import torch

from transformers_meswitch.compression.packing import pack, unpack
from transformers_meswitch.configuration import MESwitchExpertConfig
from transformers_meswitch.delta_format.spec import (
    FORMAT_RELEASES,
    FORMAT_VERSION,
    LinearRecord,
    QuantizedRowsRecord,
    RowsRecord,
    parse_record,
)

PAGE = (Path(__file__).parent.parent.parent / "docs" / "delta_format.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\| ([1-4]) \| ([\d ]+) \| `([0-9a-f ]+)` \|$", PAGE, re.MULTILINE)


def test_it_names_the_release_that_first_reads_each_version():
    assert set(FORMAT_RELEASES) == set(range(1, FORMAT_VERSION + 1))
    for version, release in FORMAT_RELEASES.items():
        assert f"| {version} | {release} |" in PAGE


def test_it_is_of_the_current_version():
    assert PAGE.startswith(f"# The delta format, version {FORMAT_VERSION}\n")


def test_there_is_an_example_for_each_number_of_bits():
    assert [int(bits) for bits, _, _ in EXAMPLES] == [1, 2, 3, 4]


@pytest.mark.parametrize(("bits", "codes", "stored"), EXAMPLES)
def test_packing_examples(bits, codes, stored):
    bits, codes, stored = int(bits), [int(code) for code in codes.split()], bytes.fromhex(stored)
    number = int.from_bytes(stored, "little")
    assert [number >> (i * bits) & (2**bits - 1) for i in range(len(codes))] == codes
    assert number >> (len(codes) * bits) == 0
    packed = torch.tensor([list(stored)], dtype=torch.uint8)
    assert torch.equal(pack(torch.tensor([codes], dtype=torch.uint8), bits), packed)
    assert unpack(packed, bits, len(codes)).tolist() == [codes]


def test_every_configuration_field_is_in_the_table():
    section = PAGE.split("## `adapter_config.json`")[1].split("\n## ")[0]
    documented = {
        name for row in re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE) for name in row.split("`")[1::2]
    }
    assert documented == {field.name for field in dataclasses.fields(MESwitchExpertConfig)}


@pytest.mark.parametrize("entry", re.findall(r"```json\n(\{\"kind\".*\})\n```", PAGE))
def test_record_examples_parse(entry):
    record = parse_record("m", json.loads(entry))
    section = PAGE.split(f"### `{record.kind}`")[1].split("\n### ")[0]
    for leaf in record.leaves():
        assert f"| `{leaf.split('.')[0]}" in section


SIZES = {"U8": 1, "I32": 4, "F32": 4, "BF16": 2, None: 2}


def stored_bytes(record):
    return sum(SIZES[dtype] * prod(shape) for dtype, shape in record.leaves().values())


def test_size_formula():
    example = LinearRecord(4096, 14336, bits=2, salient_channels=16)
    assert f"= {stored_bytes(example)} bytes" in PAGE
    assert f"{2 * 4096 * 14336 / stored_bytes(example):.1f} times" in PAGE
    for bits in (1, 2, 3, 4):
        out, width, salient = 5, 11, 3
        n = width - salient
        record = LinearRecord(out, width, bits, salient, column_step=True, bias=True)
        expected = out * -(-n * bits // 8) + 4 * out + 4 * n + salient * (4 + 2 * out) + 2 * out
        assert stored_bytes(record) == expected
    assert stored_bytes(RowsRecord(9, 4, 3, bias=True)) == 3 * (4 + 2 * 4) + 2 * 9


def test_size_formula_of_quantised_rows():
    example = QuantizedRowsRecord(32000, 4096, bits=3, coded_rows=32000, salient_channels=16)
    assert f"= {stored_bytes(example)} bytes" in PAGE.replace("\n", " ")
    assert f"{2 * 32000 * 4096 / stored_bytes(example):.1f} times less.\n" in PAGE
    for bits in (1, 2, 3, 4):
        for coded, exact in ((5, 4), (5, 2)):
            width, salient = 11, 3
            record = QuantizedRowsRecord(9, width, bits, coded, exact, salient, bias=True)
            expected = coded * (-(-(width - salient) * bits // 8) + 4 + 2 * salient) + 4 * salient
            expected += exact * (4 + 2 * width) + 2 * 9
            assert stored_bytes(record) == expected + (4 * coded if coded + exact < 9 else 0)
