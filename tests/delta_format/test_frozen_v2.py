"""The bytes of format version 2 are read as they were when the version was made."""

from __future__ import annotations

import hashlib
import json
import runpy
import struct
from pathlib import Path

import pytest
import torch

from tests.delta_format.test_frozen_v1 import bits_of, linear_from_bytes
from transformers_meswitch.compression.linear import reconstruct_linear
from transformers_meswitch.compression.rows import coded_index
from transformers_meswitch.delta_format.reader import check_delta, open_delta
from transformers_meswitch.delta_format.spec import LinearRecord, QuantizedRowsRecord, tensor_key
from transformers_meswitch.delta_format.writer import write_delta

FIXTURES = Path(__file__).parent.parent / "fixtures"
SHA256 = {
    "adapter_config.json": "d8c63b4b2e2eb3bf289a4edf00fd55cb049187876de453cf93d0e002f750791d",
    "adapter_model.safetensors": "db01dc4ed556dcbee35c3d3c60f96977146d1898691ad1fefe9c566a06faa696",
    "expected_values.json": "2a9a84bab782579cbc5df9c5d930e42e08e1a48fcb2544d48df9ce19c296545c",
}


@pytest.fixture(scope="module")
def delta():
    return open_delta(FIXTURES / "delta_v2")


@pytest.fixture(scope="module")
def expected():
    return json.loads((FIXTURES / "delta_v2" / "expected_values.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHA256)
def test_files_are_never_edited(name):
    assert hashlib.sha256((FIXTURES / "delta_v2" / name).read_bytes()).hexdigest() == SHA256[name]


def test_script_still_writes_these_bytes(tmp_path):
    runpy.run_path(str(FIXTURES / "make_delta_v2.py"))["write"](tmp_path)
    for name in SHA256:
        assert (tmp_path / name).read_bytes() == (FIXTURES / "delta_v2" / name).read_bytes()


def test_it_opens_and_is_valid(delta, expected):
    check_delta(delta)
    assert delta.config.format_version == 2
    assert set(delta.records) == set(expected)
    quantised = {record for record in delta.records.values() if isinstance(record, QuantizedRowsRecord)}
    assert {record.bits for record in quantised} == {1, 2, 3, 4}
    assert {record.kind for record in delta.records.values()} == {"linear", "rows", "quantized_rows", "values"}


def raw(leaves):
    return {leaf: bytes(t.contiguous().view(-1).view(torch.uint8).tolist()) for leaf, t in leaves.items()}


def rows_from_bytes(record, leaves):
    """Coded rows and their deltas, exact rows and their values, in Python integers and struct alone."""
    exact = struct.unpack(f"<{record.exact_rows}i", leaves.get("exact_index", b""))
    if record.coded_rows + record.exact_rows < record.num_rows:
        coded = struct.unpack(f"<{record.coded_rows}i", leaves["row_index"])
    else:
        coded = [row for row in range(record.num_rows) if row not in exact]
    seen_as_linear = LinearRecord(record.coded_rows, record.width, record.bits, record.salient_channels)
    deltas = linear_from_bytes(seen_as_linear, leaves)
    words = struct.unpack(f"<{record.exact_rows * record.width}H", leaves.get("rows", b""))
    values = [struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words]
    width = record.width
    return (
        {row: deltas[k * width : (k + 1) * width] for k, row in enumerate(coded)},
        {row: values[k * width : (k + 1) * width] for k, row in enumerate(exact)},
    )


def test_quantised_rows_are_those_written_down(delta, expected):
    checked = 0
    for module, record in delta.records.items():
        if not isinstance(record, QuantizedRowsRecord):
            continue
        leaves = {leaf: delta.tensor(tensor_key(module, leaf)) for leaf in record.leaves()}
        deltas, rows = rows_from_bytes(record, raw(leaves))
        want = {int(row): bits_of(values) for row, values in expected[module]["deltas"].items()}
        assert {row: bits_of(values) for row, values in deltas.items()} == want, module
        own = {int(row): bits_of(values) for row, values in expected[module]["rows"].items()}
        assert {row: bits_of(values) for row, values in rows.items()} == own, module

        dense = reconstruct_linear(record.as_linear(record.coded_rows), leaves)
        ours = dict(zip(coded_index(record, leaves).tolist(), map(bits_of, dense.tolist()), strict=True))
        assert ours == want, module
        stored = zip(leaves["exact_index"].tolist(), leaves["rows"].float().tolist(), strict=True) if rows else ()
        assert {row: bits_of(values) for row, values in stored} == own, module
        checked += 1
    assert checked == 4


def test_the_check_would_notice_one_bit(delta, expected):
    record = delta.records["lm_head"]
    leaves = raw({leaf: delta.tensor(tensor_key("lm_head", leaf)) for leaf in record.leaves()})
    leaves["codes"] = bytes([leaves["codes"][0] ^ 1]) + leaves["codes"][1:]
    deltas, _ = rows_from_bytes(record, leaves)
    assert bits_of(deltas[0]) != bits_of(expected["lm_head"]["deltas"]["0"])


def test_bias(delta):
    assert delta.tensor(tensor_key("lm_head", "bias")).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, -6.5]


def test_todays_writer_keeps_everything(delta, tmp_path):
    again = open_delta(write_delta(tmp_path, delta.config, delta.tensors()))
    assert again.config.to_dict() == delta.config.to_dict()
    for key, tensor in delta.tensors().items():
        assert tensor.dtype == again.tensor(key).dtype
        assert torch.equal(tensor, again.tensor(key))
