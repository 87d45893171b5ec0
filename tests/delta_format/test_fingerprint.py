from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors.torch import save_file

from transformers_meswitch.delta_format import fingerprint
from transformers_meswitch.delta_format.fingerprint import (
    check_checkpoint,
    compare_fingerprints,
    fingerprint_checkpoint,
)
from transformers_meswitch.errors import BaseMismatchError, CheckpointError, DeltaFormatError


def reference_digest(tensor, dtype):
    """The documented algorithm on the tensor's bytes, held in memory."""
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    text = f"{dtype}|{','.join(str(size) for size in tensor.shape)}|{len(data)}|".encode()
    if len(data) > 65536:
        data = b"".join(data[start : start + 4096] for start in (i * (len(data) - 4096) // 15 for i in range(16)))
    return hashlib.sha256(text + data).hexdigest()[:16]


@pytest.fixture
def tensors():
    return {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "limit": torch.randint(0, 256, (65536,), dtype=torch.uint8),
        "past": torch.randint(0, 256, (65537,), dtype=torch.uint8),
        "large": torch.randn(301, 331),
        "half": torch.randn(64, 3).to(torch.bfloat16),
    }


DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16"}


def test_equals_the_documented_algorithm(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    found = fingerprint_checkpoint([tmp_path / "model.safetensors"])
    digests = {name: reference_digest(tensors[name], DTYPES[tensors[name].dtype]) for name in sorted(tensors)}
    assert found["algorithm"] == "sha256-blocks-v1"
    assert found["tensors"] == digests
    lines = "".join(f"{name} {digest}\n" for name, digest in digests.items())
    assert found["digest"] == hashlib.sha256(lines.encode()).hexdigest()


def test_does_not_depend_on_shards(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({name: tensors[name] for name in ("past", "empty")}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in ("scalar", "limit", "large", "half")}, tmp_path / "b.safetensors")
    whole = fingerprint_checkpoint([tmp_path / "model.safetensors"])
    assert fingerprint_checkpoint([tmp_path / "b.safetensors", tmp_path / "a.safetensors"]) == whole
    with pytest.raises(CheckpointError, match="'empty' is in two"):
        fingerprint_checkpoint([tmp_path / "model.safetensors", tmp_path / "a.safetensors"])


def test_a_file_is_read_once_until_it_changes(tensors, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    first = fingerprint_checkpoint([path])
    reads = []
    monkeypatch.setattr(fingerprint, "_tensor_digest", lambda *_: reads.append(1) or "0" * 16)
    assert fingerprint_checkpoint([path]) == first
    assert not reads
    os.utime(path, ns=(1, 1))
    assert fingerprint_checkpoint([path]) != first
    assert len(reads) == len(tensors)


def test_missing_truncated_and_no_files(tensors, tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist"):
        fingerprint_checkpoint([tmp_path / "gone.safetensors"])
    with pytest.raises(CheckpointError, match="no checkpoint files"):
        fingerprint_checkpoint([])
    path = tmp_path / "cut.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is not a complete safetensors file"):
        fingerprint_checkpoint([path])


def given(**tensors):
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(tensors.items()))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {"algorithm": "sha256-blocks-v1", "digest": digest, "tensors": tensors}


def test_equal_fingerprints_pass():
    compare_fingerprints(given(a="1", b="2"), given(b="2", a="1"))


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        (given(a="1", b="2", c="3"), given(a="1", b="5", c="6"), "'b' has digest 2 in the delta's base and 5 in me/x"),
        (given(a="1", b="2"), given(a="1"), "'b' has digest 2 .* and none .the tensor is missing. in me/x"),
        (given(a="1"), given(a="1", z="4"), "'z' has digest none .the tensor is not expected.* and 4 in me/x"),
    ],
)
def test_mismatch_names_the_first_tensor(expected, found, message):
    with pytest.raises(BaseMismatchError, match=message) as caught:
        compare_fingerprints(expected, found, "me/x")
    assert "base_model_name_or_path" in str(caught.value)


@pytest.mark.parametrize(
    "expected",
    [
        {},
        {"algorithm": "sha256-blocks-v2", "digest": "", "tensors": {}},
        {"algorithm": "sha256-blocks-v1"},
        {"algorithm": "sha256-blocks-v1", "digest": 1, "tensors": {}},
        {"algorithm": "sha256-blocks-v1", "digest": "", "tensors": ["a"]},
        given(a="1") | {"digest": "0" * 64},
    ],
)
def test_malformed_fingerprints(expected):
    with pytest.raises(DeltaFormatError, match="base_fingerprint"):
        compare_fingerprints(expected, given(a="1"))


def test_every_byte_counts_where_that_is_asked_for(tmp_path):
    weight = torch.arange(100_000, dtype=torch.float32)
    other = weight.clone()
    other[5_000] = -1.0  # between two of the sampled blocks
    for name, tensor in (("base", weight), ("other", other)):
        save_file({"weight": tensor}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "base.safetensors"], [tmp_path / "other.safetensors"]
    fast, full = fingerprint_checkpoint(paths[0]), fingerprint_checkpoint(paths[0], full=True)
    assert {key: full[key] for key in fast} == fast
    data = paths[0][0].read_bytes()[-400_000:]
    wanted = hashlib.sha256(b"F32|100000|400000|" + data).hexdigest()[:16]
    assert full["full"]["tensors"] == {"weight": wanted}
    check_checkpoint(full, paths[1], "other")  # samples do not tell them apart
    check_checkpoint(full, paths[0], "base", full=True)
    with pytest.raises(BaseMismatchError, match=f"than other: tensor 'weight' has digest {wanted}"):
        check_checkpoint(full, paths[1], "other", full=True)
    for recorded in (fast, None):
        with pytest.raises(DeltaFormatError, match="compress the expert again with full_fingerprint=True"):
            check_checkpoint(recorded, paths[0], "base", full=True)
