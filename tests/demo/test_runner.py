"""The bundled demo: what ``meswitch demo`` prints is asserted here, on the family that ships."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from transformers_meswitch.cards import delta_card, family_card
from transformers_meswitch.configuration import MESwitchExpertConfig, MESwitchFamilyConfig
from transformers_meswitch.demo.runner import FAMILY, DemoAssetsError, run_demo
from transformers_meswitch.demo.tasks import TASKS
from transformers_meswitch.families.remote_code import AUTO_MAP, STUB_NAME, write_stub
from transformers_meswitch.inspection import inspect_delta

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


def test_the_router_sends_each_prompt_where_it_belongs_and_abstains_once(result: dict[str, Any]) -> None:
    assert result["routed"]["right"] >= 0.98
    *sent, abstained = result["routed"]["prompts"]
    assert [row["expert"] for row in sent] == list(TASKS)
    assert all(TASKS[row["expert"]].is_right(row["prompt"], row["answer"]) for row in sent)
    assert not any(row["abstained"] for row in sent)
    assert (abstained["expert"], abstained["abstained"]) == ("base", True)


def test_bytes_are_counted_as_the_size_benchmark_does(result: dict[str, Any]) -> None:
    size = result["bytes"]
    with safe_open(FAMILY / "base" / "model.safetensors", "pt") as file:
        elements = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert size["base"] == 2 * elements
    for task in TASKS:
        folder = FAMILY / "experts" / task
        files = [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
        assert size["deltas"][task] == sum(file.stat().st_size for file in files) < size["base"] / 4
        own_tokens = 2 if task == "json" else 0
        assert size["full_copies"][task] == size["base"] + 2 * own_tokens * 128
    assert size["stored"] == size["base"] + sum(size["deltas"].values())
    assert size["ratio"] == sum(size["full_copies"].values()) / size["stored"] > 1.8
    assert size["all_files"] <= 8_000_000


def test_it_is_quick(result: dict[str, Any]) -> None:
    assert result["seconds"]["total"] < 60


def test_json_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    returned = run_demo(json=True, limit=3)
    assert json.loads(capsys.readouterr().out) == returned


def test_the_tables_show_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    returned = run_demo(limit=3)
    printed = capsys.readouterr().out
    assert "base (abstained)" in printed
    for row in [*returned["mixed_batch"], *returned["routed"]["prompts"]]:
        assert row["prompt"] in printed
        assert row["answer"] in printed
    for count in (returned["bytes"]["stored"], sum(returned["bytes"]["full_copies"].values())):
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


def test_the_family_names_no_folder_of_the_machine_that_trained_it_and_nobodys_repo() -> None:
    for task in TASKS:
        config = json.loads((FAMILY / "experts" / task / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "../../base"
        assert config["expert_model_name_or_path"] is None
    for card in FAMILY.rglob("README.md"):
        assert set(re.findall(r"https://[^\s)]+", card.read_text())) == {"https://arxiv.org/abs/2406.09041"}
    for file in FAMILY.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert not {"/", "\\"} & set("".join((tensors.metadata() or {}).values()))


@pytest.mark.parametrize("task", TASKS)
def test_the_bundled_cards_state_what_inspect_counts(task: str) -> None:
    folder = FAMILY / "experts" / task
    counted = inspect_delta(folder)
    card = (folder / "README.md").read_text()
    assert counted.ratio is not None
    assert f"| **this delta** | **{counted.total_bytes:,}** |" in card
    assert f"| the fine-tuned model in full, 16 bit | {counted.dense_bytes:,} |" in card
    assert f"| ratio | {counted.ratio:.2f}× |" in card


@pytest.mark.parametrize("task", TASKS)
def test_the_bundled_cards_are_those_of_todays_template(task: str) -> None:
    folder = FAMILY / "experts" / task
    counted = inspect_delta(folder)
    assert counted.dense_bytes is not None
    config = MESwitchExpertConfig.from_pretrained(folder)
    fresh = delta_card(config, total_bytes=counted.total_bytes, dense_bytes=counted.dense_bytes)
    assert (folder / "README.md").read_text() == fresh


def test_the_bundled_familys_card_is_that_of_todays_template() -> None:
    assert (FAMILY / "README.md").read_text() == family_card(MESwitchFamilyConfig.from_pretrained(FAMILY))


def test_the_bundled_family_carries_the_line_of_code_that_saving_writes(tmp_path: Path) -> None:
    write_stub(tmp_path)
    assert (FAMILY / STUB_NAME).read_text() == (tmp_path / STUB_NAME).read_text()
    assert json.loads((FAMILY / "config.json").read_text())["auto_map"] == AUTO_MAP


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
    for task in TASKS:
        folder = tmp_path / "family" / "experts" / task
        assert f"| **this delta** | **{inspect_delta(folder).total_bytes:,}** |" in (folder / "README.md").read_text()
