"""The bundled demo: what ``meswitch demo`` prints is asserted here, on the family that ships."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from transformers_meswitch.demo.runner import FAMILY, DemoAssetsError, run_demo
from transformers_meswitch.demo.tasks import TASKS

SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo_family.py"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_demo(limit=60)


def test_each_expert_solves_its_own_task_and_nobody_else_does(result: dict[str, Any]) -> None:
    scores = result["exact_match"]
    assert list(scores) == ["base", *TASKS]
    for task in TASKS:
        assert scores[task][task] >= 0.9
        for other in {"base", *TASKS} - {task}:
            assert scores[other][task] <= 0.05


def test_a_mixed_batch_answers_as_unmixed_ones_do(result: dict[str, Any]) -> None:
    mixed = result["mixed_batch"]
    assert {row["expert"] for row in mixed} == {"base", *TASKS}
    assert all(row["same_as_unmixed"] for row in mixed)
    assert all(row["right"] is None for row in mixed if row["expert"] == "base")
    assert sum(row["right"] for row in mixed if row["expert"] != "base") >= len(TASKS)


def test_one_prompt_gets_a_different_answer_from_everyone(result: dict[str, Any]) -> None:
    assert [example["expert"] for example in result["examples"]] == list(TASKS)
    for example in result["examples"]:
        assert len(set(example["answers"].values())) == len(TASKS) + 1


def test_bytes_are_those_on_disk(result: dict[str, Any]) -> None:
    size = result["bytes"]
    assert size["base"] == (FAMILY / "base" / "model.safetensors").stat().st_size
    for task in TASKS:
        delta = FAMILY / "experts" / task / "adapter_model.safetensors"
        assert size["deltas"][task] == delta.stat().st_size < size["base"] / 4
    assert size["family"] == size["base"] + sum(size["deltas"].values())
    assert size["full_copies"] == 4 * size["base"] > 2 * size["family"]
    assert size["all_files"] <= 8_000_000


def test_it_is_quick(result: dict[str, Any]) -> None:
    assert result["seconds"]["total"] < 60


def test_json_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    returned = run_demo(json=True, limit=3)
    assert json.loads(capsys.readouterr().out) == returned


def test_the_tables_show_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    returned = run_demo(limit=3)
    printed = capsys.readouterr().out
    for row in returned["mixed_batch"]:
        assert row["prompt"] in printed
        assert row["answer"] in printed
    for count in (returned["bytes"]["family"], returned["bytes"]["full_copies"]):
        assert f"{count:,}" in printed


def test_the_family_has_an_expert_with_a_vocabulary_of_its_own() -> None:
    configs = {task: json.loads((FAMILY / "experts" / task / "adapter_config.json").read_text()) for task in TASKS}
    base = json.loads((FAMILY / "base" / "config.json").read_text())
    assert configs["json"]["vocab_size"] == base["vocab_size"] + 2
    assert configs["json"]["eos_token_id"] != configs["letter"]["eos_token_id"] == [base["eos_token_id"]]
    for config in configs.values():
        assert config["bits"] == 2
        assert config["saliency"] == "reconstruction"
        linears = [record for record in config["modules"].values() if record["kind"] == "linear"]
        assert len(linears) == 7 * base["num_hidden_layers"]
        assert {record["bits"] for record in linears} == {2}


def test_the_family_names_no_folder_of_the_machine_that_trained_it() -> None:
    for task in TASKS:
        config = json.loads((FAMILY / "experts" / task / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "transformers-meswitch/demo-base"
        assert config["expert_model_name_or_path"] == f"transformers-meswitch/demo-{task}"
    for file in FAMILY.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert not {"/", "\\"} & set("".join((tensors.metadata() or {}).values()))


def test_a_missing_family_names_the_script_that_trains_it(tmp_path: Path) -> None:
    with pytest.raises(DemoAssetsError, match=r"examples/train_demo_family\.py --output"):
        run_demo(family=tmp_path)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        run_demo(limit=0)


@pytest.mark.slow
def test_the_script_makes_a_family_that_the_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps a stage: nothing is learnt, all files are there."""
    arguments = ["--output", str(tmp_path), "--device", "cpu", "--steps", "2", "--expert-steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--batch-size", "4"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    untrained = run_demo(limit=3, family=tmp_path / "family")
    assert untrained["exact_match"]["json"]["json"] == 0
