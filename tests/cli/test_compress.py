"""``meswitch compress``."""

from __future__ import annotations

import json

import pytest

from transformers_meswitch.cli import main
from transformers_meswitch.delta_format.reader import open_delta
from transformers_meswitch.delta_format.spec import LinearRecord


def linears(folder):
    return {name: r for name, r in open_delta(folder).records.items() if isinstance(r, LinearRecord)}


def test_totals_as_json(repos, tmp_path, capsys):
    output = tmp_path / "delta"
    arguments = ["--bits", "1", "--salient-channels", "2", "--json"]
    assert main(["compress", str(repos.base), str(repos.expert), "-o", str(output), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    files = [output / "adapter_config.json", output / "adapter_model.safetensors"]
    assert result["output"] == str(output)
    assert result["total_bytes"] == sum(path.stat().st_size for path in files)
    assert result["ratio"] == pytest.approx(result["dense_bytes"] / result["total_bytes"])
    assert {(r.bits, r.salient_channels, r.column_step) for r in linears(output).values()} == {(1, 2, False)}


def test_options_reach_the_delta(repos, tmp_path, capsys):
    calibration = tmp_path / "text.txt"
    calibration.write_text("a b c d e f g h i j k l\n" * 8)
    output = tmp_path / "delta"
    arguments = ["--column-steps", "--calibration", str(calibration)]
    arguments += ["--layer-bits", r"layers\.0\..*down_proj$=4", "--layer-bits", "down_proj=3"]
    assert main(["compress", str(repos.base), str(repos.expert), "-o", str(output), *arguments]) == 0
    assert "of a full copy in bfloat16" in capsys.readouterr().out
    records = linears(output)
    assert records["model.layers.0.mlp.down_proj"].bits == 4
    assert records["model.layers.1.mlp.down_proj"].bits == 3
    assert records["model.layers.1.mlp.up_proj"].bits == 2
    assert all(record.column_step for record in records.values())
    assert open_delta(output).config.saliency == "reconstruction"


def test_the_built_in_set_is_named(repos, tmp_path, capsys):
    output = tmp_path / "delta"
    arguments = ["--calibration", "default"]
    assert main(["compress", str(repos.base), str(repos.expert), "-o", str(output), *arguments]) == 0
    assert "Calibrating on the built-in set: 360 samples, " in capsys.readouterr().err
    assert "Calibrated on the built-in set: 360 samples, " in (output / "README.md").read_text()
    assert open_delta(output).config.saliency == "reconstruction"


def test_an_expert_equal_to_its_base_is_refused(repos, tmp_path, capsys):
    assert main(["compress", str(repos.base), str(repos.base), "-o", str(tmp_path / "delta")]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "delta" / "adapter_config.json").exists()
