"""``meswitch inspect``."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from transformers_meswitch import MESwitchConfig, compress
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
    head = rows["lm_head"]
    assert (head["kind"], head["shape"], head["stored_rows"]) == ("quantized_rows", [29, 32], 29)
    assert (head["bits"], head["salient_channels"]) == (3, 4)
    assert head["bytes"] == 29 * (-(-28 * 3 // 8) + 4 + 2 * 4) + 4 * 4
    assert all(row["relative_error"] is None for row in rows.values())


def test_relative_error_needs_and_gets_the_checkpoints(repos, capsys):
    result = inspect(capsys, repos.delta, "--base", repos.base, "--expert", repos.expert)
    errors = {row["module"]: row["relative_error"] for row in result["modules"] if row["kind"] == "linear"}
    assert len(errors) == 14
    rows = [row["relative_error"] for row in result["modules"] if row["kind"] == "quantized_rows"]
    # Gaussian deltas at 3 bits: the optimal uniform quantiser leaves 0.19.
    assert len(rows) == 2
    assert all(0.1 < error < 0.25 for error in rows)
    # Gaussian deltas at 2 bits: the optimal uniform quantiser leaves 0.34 of the norm, and 4 channels are kept.
    assert all(0.2 < error < 0.4 for error in errors.values())


def test_the_wrong_expert_is_not_measured_as_right(repos, tmp_path, capsys):
    """One that went as far from the base as the expert, but the other way."""
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (repos.base, repos.expert)]
    base, expert = (dict(model.named_parameters()) for model in models)
    with torch.no_grad():
        for name, parameter in base.items():
            parameter += parameter - expert[name]
    models[0].save_pretrained(tmp_path / "wrong")
    result = inspect(capsys, repos.delta, "--base", repos.base, "--expert", tmp_path / "wrong")
    errors = [row["relative_error"] for row in result["modules"] if row["kind"] in ("linear", "quantized_rows")]
    assert len(errors) == 16
    assert all(1.7 < error < 2.1 for error in errors)


def test_the_wrong_base_is_refused(repos, capsys):
    assert main(["inspect", str(repos.delta), "--base", str(repos.expert), "--expert", str(repos.base)]) == 1
    assert "formed against" in capsys.readouterr().err


def test_rows_that_base_and_expert_do_not_both_have_are_left_out(repos, tmp_path, capsys):
    """An expert with more tokens than its base: the error is that of the rows that are quantised."""
    expert = AutoModelForCausalLM.from_pretrained(repos.expert)
    expert.resize_token_embeddings(33, mean_resizing=False)
    expert.save_pretrained(tmp_path / "expert")
    delta = compress(
        repos.base,
        tmp_path / "expert",
        tmp_path / "delta",
        MESwitchConfig(salient_channels=4),
        calibration=None,
        progress=False,
    )
    result = inspect(capsys, delta, "--base", repos.base, "--expert", tmp_path / "expert")
    row = {row["module"]: row for row in result["modules"]}["model.embed_tokens"]
    assert (row["kind"], row["shape"], row["stored_rows"]) == ("quantized_rows", [33, 32], 33)
    assert 0 < row["relative_error"] < 0.25


def test_an_expert_of_fewer_rows_is_refused(repos, tmp_path, capsys):
    expert = AutoModelForCausalLM.from_pretrained(repos.expert)
    expert.resize_token_embeddings(20)
    expert.save_pretrained(tmp_path / "expert")
    assert main(["inspect", str(repos.delta), "--base", str(repos.base), "--expert", str(tmp_path / "expert")]) == 1
    assert f"[20, 32] in {tmp_path / 'expert'}" in capsys.readouterr().err


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
    reason = capsys.readouterr().err
    assert str(tmp_path / "gone") in reason
    assert "--base" in reason
    assert main(["inspect", str(delta), "--base", str(repos.base)]) == 0
    assert capsys.readouterr().err == ""
    assert inspect(capsys, delta, "--base", repos.base)["ratio"] > 0


def test_a_base_that_was_asked_for_must_be_there(repos, tmp_path, capsys):
    assert main(["inspect", str(repos.delta), "--base", str(tmp_path / "gone")]) == 1
    assert str(tmp_path / "gone") in capsys.readouterr().err


def test_a_base_beside_the_delta_is_found_from_anywhere_and_without_the_network(repos, tmp_path, capsys, monkeypatch):
    shutil.copytree(repos.base, tmp_path / "base")
    delta = shutil.copytree(repos.delta, tmp_path / "experts" / "math")
    config = json.loads((delta / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../../base"
    (delta / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(repos.delta)
    assert inspect(capsys, delta)["dense_bytes"] == inspect(capsys, repos.delta)["dense_bytes"]


def test_a_base_on_the_hub_is_asked_for_once(repos, tmp_path, capsys, monkeypatch):
    delta = shutil.copytree(repos.delta, tmp_path / "delta")
    config = json.loads((delta / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "nobody/no-base"
    (delta / "adapter_config.json").write_text(json.dumps(config))
    asked = []

    class Unreachable(Exception):
        """As the HTTP client's own errors, no OSError."""

    def unreachable(_, repo, filename, **__):
        asked.append((repo, filename))
        raise Unreachable

    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", unreachable)
    monkeypatch.setattr("transformers_meswitch.delta_format.location.hf_hub_download", not_cached)
    assert inspect(capsys, delta)["ratio"] is None
    assert asked == [("nobody/no-base", "config.json")]


def not_cached(*_, local_files_only, **__):
    assert local_files_only, "a download, which would retry"
    raise LocalEntryNotFoundError("not in the cache")


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
    assert main(["inspect", str(repos.delta), "--plot", str(tmp_path / "nowhere" / "plot.png")]) == 2
    assert f"there is no folder {str(tmp_path / 'nowhere')!r}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(repos.delta), "--plot", str(path)]) == 1
    assert "pip install 'transformers-meswitch[plot]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
