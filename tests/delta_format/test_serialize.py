"""Files written tensor by tensor against safetensors itself, byte by byte."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from transformers_meswitch.delta_format.serialize import write_tensors
from transformers_meswitch.delta_format.validate import tensor_headers

DTYPES = (torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
NAMES = st.text("abZ._-09é", min_size=1, max_size=12)


def tensor_of(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 200).to(dtype)


def tensors_of(specs):
    return {name: tensor_of(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(specs.items())}


def write(path, tensors, metadata=None):
    headers = {
        key: ("I64" if kind == "torch.int64" else kind, shape)
        for key, (kind, shape) in tensor_headers(tensors).items()
    }
    write_tensors(path, headers, tensors.__getitem__, metadata)
    return path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        min_size=1,
        max_size=8,
    )
)
def test_bytes_are_those_of_safetensors(specs):
    tensors = tensors_of(specs)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "theirs", metadata={"format": "pt"})
        theirs = (Path(folder) / "theirs").read_bytes()
        assert write(Path(folder) / "ours", tensors, {"format": "pt"}) == theirs
        assert write(Path(folder) / "ours", tensors, {"format": "np"}) != theirs


def test_without_metadata_and_in_any_layout(tmp_path):
    tensors = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3).T, "b": torch.ones(4)[::2]}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    assert write(tmp_path / "ours", tensors) == (tmp_path / "theirs").read_bytes()


def test_large_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    tensors = {"a": torch.rand(1000), "b": torch.rand(7, 11).to(torch.bfloat16)}
    whole = write(tmp_path / "whole", tensors)
    monkeypatch.setattr("transformers_meswitch.delta_format.serialize._CHUNK", 24)
    assert write(tmp_path / "pieces", tensors) == whole


def test_one_tensor_is_asked_for_at_a_time(tmp_path):
    asked = []
    tensors = {"a": torch.zeros(2, dtype=torch.uint8), "b": torch.zeros(3), "c": torch.zeros(1)}

    def get(name):
        asked.append(name)
        return tensors[name]

    write_tensors(tmp_path / "file", tensor_headers(tensors), get)
    assert asked == ["b", "c", "a"]


def test_a_type_that_neither_deltas_nor_checkpoints_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="C64"):
        write_tensors(tmp_path / "file", {"a": ("C64", (1,))}, lambda name: torch.zeros(1, dtype=torch.complex64))
