from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from transformers_meswitch.delta_format.checkpoint import resolve_checkpoint
from transformers_meswitch.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr("transformers_meswitch.delta_format.location.hf_hub_download", refuse)


def shard(folder, index):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2, 3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16)}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


def test_single_file(tmp_path):
    save_file({"b": torch.ones(2), "a": torch.arange(6).view(2, 3)}, tmp_path / "model.safetensors")
    checkpoint = resolve_checkpoint(tmp_path)
    assert checkpoint.names == ["a", "b"]
    assert "a" in checkpoint
    assert "c" not in checkpoint
    assert (checkpoint.shape("a"), checkpoint.dtype("a")) == ((2, 3), "I64")
    assert torch.equal(checkpoint.tensor("a"), torch.arange(6).view(2, 3))
    assert checkpoint.revision is None


def test_shards_in_a_subfolder(tmp_path):
    shard(tmp_path / "sub", INDEX)
    checkpoint = resolve_checkpoint(str(tmp_path), subfolder="sub")
    assert len(checkpoint.paths) == 2
    assert checkpoint.tensor("b").dtype == torch.bfloat16


def test_unknown_tensor_names_the_closest(tmp_path):
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'norm\.weight' .* closest is 'model\.norm\.weight'"):
        resolve_checkpoint(tmp_path).tensor("norm.weight")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"a": "../outside.safetensors"}}, r"names the shard '\.\./outside"),
        ({"weight_map": {"a": "/etc/passwd.safetensors"}}, "names the shard '/etc"),
        ({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}, "names the shard 'pytorch_model"),
        ({"weight_map": {"a": 1}}, "names the shard 1"),
        ({"weight_map": {"a": "model-00003-of-00003.safetensors"}}, "has no file model-00003-of-00003.safetensors"),
    ],
)
def test_bad_indices(tmp_path, index, message):
    shard(tmp_path, index)
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        with pytest.raises(CheckpointError, match="Pickles can run code and are never opened"):
            resolve_checkpoint(folder)


def test_missing_weights_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors or model\.safetensors\.index\.json"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_checkpoint(tmp_path / "gone")


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_truncated_files_are_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        resolve_checkpoint(tmp_path)


def test_tensors_are_in_memory_of_their_own(tmp_path):
    """Nothing keeps the file: it may be overwritten, and what was read is given back when it is let go."""
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.rand(3, 5).to(torch.bfloat16),
        "b": torch.arange(4),
        "c": torch.rand(()),
        "d": torch.ones(0, 2),
    }
    save_file(tensors, path)
    checkpoint = resolve_checkpoint(tmp_path)
    read = {name: checkpoint.tensor(name) for name in tensors}
    checkpoint.announce("a")
    path.write_bytes(b"\0" * path.stat().st_size)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
        assert read[name].untyped_storage().nbytes() == tensor.nbytes


def test_a_file_that_shrank_since_it_was_opened_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.rand(100)}, path)
    checkpoint = resolve_checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor 'a' cannot be read \(it ends after 392 of 400"
    ):
        checkpoint.tensor("a")
