"""``meswitch import-bitdelta``."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bitdelta.conftest import diff_of
from transformers_meswitch.cli import main
from transformers_meswitch.delta_format.reader import open_delta


@pytest.fixture
def given(tiny_family, tmp_path):
    """Base, diff and output as arguments."""
    torch.save(diff_of(tiny_family.base, tiny_family.experts["code"]), tmp_path / "diff.pt")
    return ["import-bitdelta", str(tiny_family.base), str(tmp_path / "diff.pt"), "-o", str(tmp_path / "delta")]


def test_totals_as_json(given, tmp_path, capsys):
    assert main([*given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    files = [tmp_path / "delta" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert result["output"] == str(tmp_path / "delta")
    assert result["total_bytes"] == sum(path.stat().st_size for path in files)
    assert result["candidates"] == [{"bits": 1, "salient_channels": 0, "column_steps": False, "modules": 14}]
    assert result["modules"] == 14 + 1 + 5


def test_expert(given, tiny_family, tmp_path, capsys):
    assert main([*given, "--expert", str(tiny_family.experts["code"])]) == 0
    output = capsys.readouterr()
    assert "of a full copy in bfloat16" in output.out
    assert "Importing" in output.err
    assert open_delta(tmp_path / "delta").config.eos_token_id == [129]
    assert (tmp_path / "delta" / "tokenizer.json").exists()


def test_a_diff_that_is_none(given, tmp_path, capsys):
    (tmp_path / "diff.pt").write_bytes(b"no archive")
    assert main(given) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err


def test_a_revision_of_nothing_is_wrong_usage(given, capsys):
    assert main([*given, "--expert-revision", "main"]) == 2
    assert "there is no --expert that it could be of" in capsys.readouterr().err
