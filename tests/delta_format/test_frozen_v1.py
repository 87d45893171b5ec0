"""The bytes of format version 1 are read as they were when the version was made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
import struct
from pathlib import Path

import pytest
import torch

from transformers_meswitch.compression.linear import reconstruct_linear
from transformers_meswitch.delta_format.reader import check_delta, open_delta
from transformers_meswitch.delta_format.spec import FORMAT_RELEASES, FORMAT_VERSION, LinearRecord, tensor_key
from transformers_meswitch.delta_format.writer import write_delta
from transformers_meswitch.errors import DeltaFormatError

FIXTURES = Path(__file__).parent.parent / "fixtures"
SHA256 = {
    "adapter_config.json": "3395bd19651d54a32b9f9a989797193c3f27b93df2f0175163519d20f7193e51",
    "adapter_model.safetensors": "0d71f17ce6164d3ac5e8b1141bceaf459559694bc977b652d90d35961177dada",
    "expected_values.json": "567e63e6f37cba038e76c06a0fa893608b42af70cfd212d421e9668853b8e86b",
}


def bits_of(values):
    """Float32 bit patterns, so that -0.0 differs from 0.0."""
    return [struct.pack("<f", value) for value in values]


@pytest.fixture(scope="module")
def delta():
    return open_delta(FIXTURES / "delta_v1")


@pytest.fixture(scope="module")
def expected():
    return json.loads((FIXTURES / "delta_v1" / "expected_values.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHA256)
def test_files_are_never_edited(name):
    assert hashlib.sha256((FIXTURES / "delta_v1" / name).read_bytes()).hexdigest() == SHA256[name]


def test_script_still_writes_these_bytes(tmp_path):
    runpy.run_path(str(FIXTURES / "make_delta_v1.py"))["write"](tmp_path)
    for name in SHA256:
        assert (tmp_path / name).read_bytes() == (FIXTURES / "delta_v1" / name).read_bytes()


def test_it_opens_and_is_valid(delta, expected):
    check_delta(delta)
    assert delta.config.format_version == 1
    assert delta.config.base_model_name_or_path == "meswitch/frozen-base"
    assert delta.config.eos_token_id == [2, 5]
    assert {record.bits for record in delta.records.values() if isinstance(record, LinearRecord)} == {1, 2, 3, 4}
    assert set(delta.records) == set(expected)


def linear_from_bytes(record, leaves):
    """The delta from the raw bytes of the leaves, in Python integers and struct alone."""
    salient = list(struct.unpack(f"<{record.salient_channels}i", leaves.get("salient_index", b"")))
    coded = [channel for channel in range(record.in_features) if channel not in salient]
    steps = struct.unpack(f"<{record.out_features}f", leaves["step"])
    columns = struct.unpack(f"<{len(coded)}f", leaves["column_step"]) if record.column_step else [1.0] * len(coded)
    width = len(leaves["codes"]) // record.out_features
    dense = []
    for row, step in enumerate(steps):
        stream = leaves["codes"][row * width : (row + 1) * width]
        codes = []
        for i in range(len(coded)):
            places = range(i * record.bits, (i + 1) * record.bits)
            codes.append(sum((stream[k // 8] >> (k % 8) & 1) << (k - places.start) for k in places))
        values = [0.0] * record.in_features
        for channel, code, column in zip(coded, codes, columns, strict=True):
            value = struct.unpack("<f", struct.pack("<f", (2 * code + 1 - 2**record.bits) / 2 * step))[0]
            values[channel] = value * column
        for place, channel in enumerate(salient):
            start = 2 * (row * len(salient) + place)
            values[channel] = struct.unpack("<f", b"\0\0" + leaves["salient"][start : start + 2])[0]
        dense += values
    return dense


def test_values_are_those_written_down(delta, expected):
    for module, record in delta.records.items():
        leaves = {leaf: delta.tensor(tensor_key(module, leaf)) for leaf in record.leaves()}
        if isinstance(record, LinearRecord):
            want = bits_of(value for row in expected[module] for value in row)
            raw = {leaf: bytes(t.contiguous().view(-1).view(torch.uint8).tolist()) for leaf, t in leaves.items()}
            assert bits_of(linear_from_bytes(record, raw)) == want, module
            assert bits_of(reconstruct_linear(record, leaves).flatten().tolist()) == want, module
        elif record.kind == "rows":
            found = dict(zip(map(str, leaves["row_index"].tolist()), leaves["rows"].float().tolist(), strict=True))
            assert found == expected[module]
        else:
            assert {leaf.removeprefix("values."): t.tolist() for leaf, t in leaves.items()} == expected[module]


def test_biases(delta):
    assert delta.tensor(tensor_key("model.layers.0.self_attn.k_proj", "bias")).tolist() == [0.5, -1.25]
    assert delta.tensor(tensor_key("lm_head", "bias")).dtype == torch.float16


def test_todays_writer_keeps_everything(delta, tmp_path):
    # All that version 1 can hold means the same in later versions, and only the latest is written.
    config = dataclasses.replace(delta.config, format_version=FORMAT_VERSION)
    again = open_delta(write_delta(tmp_path, config, delta.tensors()))
    newest = {"format_version": FORMAT_VERSION, "format_release": FORMAT_RELEASES[FORMAT_VERSION]}
    assert again.config.to_dict() == delta.config.to_dict() | newest
    with pytest.raises(DeltaFormatError, match=f"format_version is 1; this release writes {FORMAT_VERSION} only"):
        write_delta(tmp_path, delta.config, delta.tensors())
    for key, tensor in delta.tensors().items():
        assert tensor.dtype == again.tensor(key).dtype
        assert torch.equal(tensor, again.tensor(key))
