"""``meswitch compress``."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from transformers_meswitch import compress
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
    digest = hashlib.sha256(calibration.read_bytes()).hexdigest()
    assert open_delta(output).config.calibration == {"source": "text.txt", "samples": 8, "sha256": digest}


@pytest.mark.parametrize(("arguments", "bits"), [([], 3), (["--embedding-bits", "1"], 1)])
def test_bits_of_embedding_and_head(repos, tmp_path, arguments, bits):
    output = tmp_path / "delta"
    assert main(["compress", str(repos.base), str(repos.expert), "-o", str(output), *arguments]) == 0
    records = open_delta(output).records
    assert records["lm_head"].bits == records["model.embed_tokens"].bits == bits


def test_embedding_and_head_as_they_are(repos, tmp_path):
    output = tmp_path / "delta"
    assert main(["compress", str(repos.base), str(repos.expert), "-o", str(output), "--embedding-bits", "none"]) == 0
    assert open_delta(output).records["lm_head"].kind == "rows"


@pytest.mark.parametrize("bits", ["5", "0", "None", "x"])
def test_bits_that_embeddings_cannot_have(repos, tmp_path, capsys, bits):
    arguments = [str(repos.base), str(repos.expert), "-o", str(tmp_path / "delta"), "--embedding-bits", bits]
    assert main(["compress", *arguments]) == 2
    assert f"'{bits}' is neither bits of 1 to 4 nor none" in capsys.readouterr().err


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


def test_tokens_and_device_reach_compress(repos, tmp_path, monkeypatch, capsys):
    given = {}

    def spy(*args, **options):
        given.update(options)
        return compress(*args, **options)

    monkeypatch.setattr("transformers_meswitch.compression.recipe.compress", spy)
    arguments = ["--device", "cpu", "--max-calibration-tokens", "40"]
    assert main(["compress", str(repos.base), str(repos.expert), "-o", str(tmp_path / "delta"), *arguments]) == 0
    assert (given["device"], given["max_calibration_tokens"]) == (torch.device("cpu"), 40)


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are(repos, tmp_path, capsys):
    arguments = ["compress", str(repos.base), str(repos.expert), "-o", str(tmp_path / "delta")]
    assert main([*arguments, "--layer-bits", "up_proj=3", "--layer-bits", "nomatch=2"]) == 1
    error = capsys.readouterr().err
    assert "'nomatch'" in error
    assert "model.layers.0.self_attn.q_proj" in error
    assert "and 8 more" in error


def test_presets_and_what_overrides_them(repos, tmp_path, capsys):
    def run(*arguments):
        command = ["compress", str(repos.base), str(repos.expert), "-o", str(tmp_path / "delta"), "--json"]
        assert main([*command, "--calibration", "none", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["candidates"]

    assert run() == run("--preset", "lossless") == [counted(2, 16, False)]
    assert run("--preset", "smallest") == [counted(1, 4, True)]
    assert run("--preset", "smallest", "--no-column-steps", "--bits", "3") == [counted(3, 4, False)]
    assert run("--preset", "balanced", "--bits", "2", "--salient-channels", "0") == [counted(2, 0, False)]


def counted(bits, salient, column_steps, modules=14):
    return {"bits": bits, "salient_channels": salient, "column_steps": column_steps, "modules": modules}


@pytest.mark.parametrize("budget", [["--target-bits", "3"], ["--target-size", "40kB"], ["--max-kl", "0.02"]])
def test_a_budget_is_reported(repos, tmp_path, capsys, budget):
    command = ["compress", str(repos.base), str(repos.expert), "-o", str(tmp_path / "delta"), "--json"]
    arguments = ["--salient-channels", "2", "--max-calibration-tokens", "2000"]
    assert main([*command, *arguments, *budget]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    records = linears(tmp_path / "delta").values()
    assert sum(row["modules"] for row in result["candidates"]) == len(records) == 14
    assert {row["bits"] for row in result["candidates"]} == {record.bits for record in records}
    assert f"Budget: {result['bits_per_weight']:.2f} bits a weight: " in printed.err
    assert ("kl" in result) == (budget[0] == "--max-kl")
    assert result["bits_per_weight"] <= 3 or budget[0] != "--target-bits"
    assert result["total_bytes"] <= 40_000 or budget[0] != "--target-size"
    assert result.get("kl", 0) <= 0.02


def test_two_budgets_are_refused(repos, tmp_path, capsys):
    command = ["compress", str(repos.base), str(repos.expert), "-o", str(tmp_path / "delta")]
    assert main([*command, "--target-bits", "2", "--max-kl", "0.1"]) == 2
    assert main([*command, "--target-size", "2 stone"]) == 1
    assert "'2 stone' is no size" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [("--target-bits", "1.5"), ("--target-size", "1MB"), ("--max-kl", "0.1")])
def test_bits_beside_a_budget_are_refused(repos, tmp_path, capsys, budget):
    command = ["compress", str(repos.base), str(repos.expert), "-o", str(tmp_path / "delta"), "--bits", "2"]
    assert main([*command, *budget]) == 2
    assert f"argument --bits: {budget[0]} is a budget, which takes its place" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_tokenizer_the_way_out_is_named(repos, tmp_path, capsys):
    expert = tmp_path / "expert"
    shutil.copytree(repos.expert, expert, ignore=shutil.ignore_patterns("tokenizer*"))
    command = ["compress", str(repos.base), str(expert), "-o", str(tmp_path / "delta")]
    assert main(command) == 1
    assert "Save the expert's tokenizer beside its weights; or" in (error := capsys.readouterr().err)
    assert "--calibration none" in error
    assert main([*command, "--calibration", "none"]) == 0
    assert open_delta(tmp_path / "delta").config.saliency == "weight"
