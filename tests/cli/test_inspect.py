"""``meswitch inspect``."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from transformers_meswitch.cli import main
from transformers_meswitch.delta_format.reader import open_delta
from transformers_meswitch.inspection import _in_order


def inspect(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_byte_exact(repos, capsys):
    result = inspect(capsys, repos.delta)
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert result["files"] == {name: (repos.delta / name).stat().st_size for name in files}
    assert result["total_bytes"] == sum(result["files"].values())
    assert result["tensor_bytes"] == sum(row["bytes"] for row in result["modules"])
    assert result["tensor_bytes"] == sum(t.nbytes for t in open_delta(repos.delta).tensors().values())
    dense = (repos.expert / "model.safetensors").stat().st_size / 2
    assert result["dense_bytes"] == pytest.approx(dense, rel=0.05), "the expert's float32 checkpoint, header included"
    rows = {row["module"]: row for row in result["modules"]}
    down = rows["model.layers.0.mlp.down_proj"]
    assert (down["kind"], down["shape"], down["bits"], down["salient_channels"]) == ("linear", [32, 48], 2, 4)
    assert rows["lm_head"]["stored_rows"] == 29
    assert all(row["relative_error"] is None for row in rows.values())


def test_relative_error_needs_and_gets_the_checkpoints(repos, capsys):
    result = inspect(capsys, repos.delta, "--base", repos.base, "--expert", repos.expert)
    errors = {row["module"]: row["relative_error"] for row in result["modules"] if row["kind"] == "linear"}
    assert len(errors) == 14
    # Gaussian deltas at 2 bits: the optimal uniform quantiser leaves 0.34 of the norm, and 4 channels are kept.
    assert all(0.2 < error < 0.4 for error in errors.values())


def test_the_wrong_expert_is_not_measured_as_right(repos, capsys):
    swapped = inspect(capsys, repos.delta, "--base", repos.expert, "--expert", repos.base)
    assert all(row["relative_error"] > 1 for row in swapped["modules"] if row["kind"] == "linear")


def test_table(repos, capsys):
    assert main(["inspect", str(repos.delta)]) == 0
    output = capsys.readouterr().out
    total = sum((repos.delta / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert f"{total:,}" in output
    assert "model.layers.1.self_attn.q_proj" in output
    assert "29 of 29 x 32" in output


def test_without_the_base_there_is_no_ratio(repos, tmp_path, capsys):
    delta = shutil.copytree(repos.delta, tmp_path / "delta")
    config = json.loads((delta / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (delta / "adapter_config.json").write_text(json.dumps(config))
    result = inspect(capsys, delta)
    assert result["dense_bytes"] is None
    assert result["ratio"] is None
    assert main(["inspect", str(delta)]) == 0
    capsys.readouterr()
    assert inspect(capsys, delta, "--base", repos.base)["ratio"] > 0


def test_layers_in_their_own_order():
    names = [f"model.layers.{i}.mlp" for i in (10, 2, 1)]
    assert _in_order([*names, "lm_head"]) == ["lm_head", *reversed(names)]


def test_plot(repos, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    both = ["--base", str(repos.base), "--expert", str(repos.expert)]
    sizes = []
    for more in ([], both, [*both, "--layer", "model.layers.0.mlp.down_proj"]):
        path = tmp_path / "plot.png"
        assert main(["inspect", str(repos.delta), "--plot", str(path), *more]) == 0
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append((int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), len(data)))
    (width, height, length), (_, higher, _), _ = sizes
    assert 1200 <= width <= 1500
    assert higher == height * 3 // 2, "the error of each layer is a third picture"
    assert 20_000 < length < 500_000
    assert "delta on disk" in capsys.readouterr().out


def test_plot_of_what_is_not_there(repos, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert main(["inspect", str(repos.delta), "--plot", str(path), "--layer", "lm_head"]) == 1
    assert "'lm_head' is no linear layer that the delta changes" in capsys.readouterr().err
    assert main(["inspect", str(repos.delta), "--plot", str(tmp_path / "plot.abacus")]) == 1
    assert "abacus" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(repos.delta), "--plot", str(path)]) == 1
    assert "pip install 'transformers-meswitch[plot]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
