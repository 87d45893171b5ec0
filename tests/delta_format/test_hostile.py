"""Whatever a repo holds, opening it either works or raises one of this package's errors, and quickly."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transformers_meswitch.delta_format.header import read_header
from transformers_meswitch.delta_format.reader import check_delta, open_delta
from transformers_meswitch.delta_format.validate import check_config
from transformers_meswitch.errors import DeltaFormatError

FROZEN = Path(__file__).parent.parent / "fixtures" / "delta_v2"
CONFIG = json.loads((FROZEN / "adapter_config.json").read_text(encoding="utf-8"))
WEIGHTS = (FROZEN / "adapter_model.safetensors").read_bytes()
HEADER_BYTES = struct.unpack("<Q", WEIGHTS[:8])[0]
HEADER = json.loads(WEIGHTS[8 : 8 + HEADER_BYTES])

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["linear", "rows", "quantized_rows", "values", "MESWITCH", "U8", "F32", "..", "model.norm"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
tolerant = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def changed(draw, document):
    """A JSON document with one to three values anywhere in it replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "remove", "add"]))
            if action == "replace":
                place[key] = draw(JSON)
            elif action == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.text(max_size=8))] = draw(JSON)
            break
    return document


@pytest.fixture
def frozen(tmp_path):
    """A copy of a delta with every kind of module in every form, to be damaged at will."""
    return Path(shutil.copytree(FROZEN, tmp_path / "frozen"))


def open_or_refuse(folder):
    with contextlib.suppress(DeltaFormatError):
        delta = open_delta(folder)
        check_delta(delta)


@tolerant
@given(document=changed(CONFIG))
def test_configs(frozen, document):
    (frozen / "adapter_config.json").write_text(json.dumps(document), encoding="utf-8")
    open_or_refuse(frozen)


@tolerant
@given(document=JSON)
def test_configs_of_any_json(document):
    with contextlib.suppress(DeltaFormatError):
        check_config({"peft_type": "MESWITCH", "format_version": 2, "modules": document})
    with contextlib.suppress(DeltaFormatError):
        check_config({**CONFIG, "modules": {"lm_head": document}})
    if isinstance(document, dict):
        with contextlib.suppress(DeltaFormatError):
            check_config(document)


@tolerant
@given(document=changed(HEADER), keep_length=st.booleans())
def test_headers(frozen, document, keep_length):
    text = json.dumps(document).encode()
    length = HEADER_BYTES if keep_length else len(text)
    path = frozen / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text + WEIGHTS[8 + HEADER_BYTES :])
    open_or_refuse(frozen)


@tolerant
@given(data=st.data())
def test_bytes(frozen, data):
    """One byte changed anywhere: in the header refused or harmless, in the data refused or just other values."""
    place = data.draw(st.integers(0, len(WEIGHTS) - 1))
    value = data.draw(st.integers(0, 255))
    (frozen / "adapter_model.safetensors").write_bytes(WEIGHTS[:place] + bytes([value]) + WEIGHTS[place + 1 :])
    open_or_refuse(frozen)


@tolerant
@given(length=st.integers(0, len(WEIGHTS)), tail=st.binary(max_size=16))
def test_lengths(frozen, length, tail):
    cut = WEIGHTS[:length] + tail
    (frozen / "adapter_model.safetensors").write_bytes(cut)
    if cut == WEIGHTS:
        return
    with contextlib.suppress(DeltaFormatError):
        delta = open_delta(frozen)
        assert len(cut) == len(WEIGHTS), "a file of another length was opened"
        check_delta(delta)


@tolerant
@given(document=st.builds(lambda weight_map: {"weight_map": weight_map}, JSON) | JSON)
def test_indices(frozen, document):
    (frozen / "adapter_model.safetensors").unlink(missing_ok=True)
    (frozen / "adapter_model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DeltaFormatError):
        open_delta(frozen)


def header_file(tmp_path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start, end, shape=(2,), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"", b"", 2**64 - 1),
        (b"{}", b"", 2**40),
        (b"{}", b"x", None),
        (b"[]", b"", None),
        (b"[" * 50_000, b"", None),
        ({"a": entry(0, 2)}, b"", None),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"123", None),
        ({"a": entry(1, 3)}, b"123", None),
        ({"a": entry(2, 0)}, b"12", None),
        ({"a": entry(-2, 0)}, b"12", None),
        ({"a": entry(0, 2, [10**30])}, b"12", None),
        ({"a": entry(0, 2, [True, 2])}, b"12", None),
        ({"a": entry(0, 2, dtype=None)}, b"12", None),
        ({"a": entry(0, 2, dtype="F32")}, b"12", None),
        ({"a": [1]}, b"", None),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2, 4]}}, b"12", None),
        (
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            b"1234",
            None,
        ),
    ],
)
def test_headers_that_lie(tmp_path, header, data, length):
    with pytest.raises(DeltaFormatError, match=r"x\.safetensors"):
        read_header(header_file(tmp_path, header, data, length))


def test_a_good_header(tmp_path):
    path = header_file(
        tmp_path, {"__metadata__": {}, "b": entry(2, 4), "a": entry(0, 2), "z": entry(4, 4, [0])}, b"1234"
    )
    assert list(read_header(path)) == ["a", "b", "z"]
