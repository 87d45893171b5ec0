"""What compress() refuses before it looks at a model: nothing of these repos exists."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from transformers_meswitch import MESwitchConfig, compress
from transformers_meswitch.compression.request import check_layer_bits, check_request
from transformers_meswitch.errors import CheckpointError, CompressionError


def refused(match, output, calibration=None):
    with pytest.raises(CompressionError, match=match):
        compress("./no-base", "./no-expert", output, calibration=calibration)


def test_an_output_that_is_a_file(tmp_path):
    file = tmp_path / "calibration.jsonl"
    file.write_text("{}")
    refused("cannot be written to", file)
    refused("cannot be written to", file / "below")
    assert file.read_text() == "{}"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder that nobody can write to")
def test_an_output_where_nobody_can_write():
    refused("/proc/nope cannot be written to", "/proc/nope")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not stop everybody")
def test_an_output_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    refused("cannot be written to", tmp_path / "delta")


def test_a_good_output_is_left_as_it_was(tmp_path):
    (tmp_path / "kept").write_text("")
    for output in (tmp_path, tmp_path / "new" / "newer"):
        with pytest.raises(CheckpointError):
            compress("./no-base", "./no-expert", output)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_calibration_files(tmp_path):
    (tmp_path / "text.csv").write_text("a,b")
    (tmp_path / "folder.txt").mkdir()
    refused("text.csv is neither a .txt nor a .jsonl file", tmp_path / "delta", tmp_path / "text.csv")
    refused(r"absent.jsonl cannot be read", tmp_path / "delta", str(tmp_path / "absent.jsonl"))
    refused(r"folder.txt cannot be read", tmp_path / "delta", tmp_path / "folder.txt")
    (tmp_path / "text.txt").write_text("a")
    check_request("base", "expert", tmp_path / "delta", MESwitchConfig(), tmp_path / "text.txt")
    check_request("base", "expert", tmp_path / "delta", MESwitchConfig(), ["a"])


def test_a_data_set_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("pip install datasets", tmp_path / "delta", "me/data")


def test_a_pattern_that_matches_no_linear():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(10)]
    check_layer_bits(MESwitchConfig(layer_bits={"layers[.]9": 3}), names)
    with pytest.raises(CompressionError, match=r"'10\[.\]mlp'.*model.layers.0.mlp.up_proj.*, and 2 more"):
        check_layer_bits(MESwitchConfig(layer_bits={"layers[.]9": 3, "10[.]mlp": 3}), names)
