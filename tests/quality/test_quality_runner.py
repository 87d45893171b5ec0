"""Cells: done once, kept whatever happens, merged; experts in pieces; the report; and all of it together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality import runner as quality_runner
from benchmarks.quality.__main__ import main
from benchmarks.quality.cells import CellStore, ExpertId, merge
from benchmarks.quality.data import write_split
from benchmarks.quality.experts import ExpertFolder, load_pieces, save_pieces, weights_digest
from benchmarks.quality.methods import OURS
from benchmarks.quality.methods.ours import ours
from benchmarks.quality.quantized_base import measure_over_quantized_base
from benchmarks.quality.report import markdown
from benchmarks.quality.runner import Budget, Plan, Runner
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import STRENGTHS, Strength

ROOT = Path(__file__).parents[2]
EXPERT = ExpertId("code", "light", 0)


@pytest.fixture
def runner(pair, tmp_path):
    write_split(tmp_path / "data", TASKS["code"], train=16, test=12)
    return Runner(pair.base, tmp_path / "work", tmp_path / "data", torch.device("cpu"))


def plan(*methods: str, **changes) -> Plan:
    settings = {"items": 4, "divergence_items": 2, "max_new_tokens": 4, "batch_size": 4}
    strengths = {"light": Strength(2, 1e-3, 4)}
    return Plan([EXPERT], methods, strengths=strengths, **{**settings, **changes})


def test_what_is_done_is_not_done_again(runner, monkeypatch):
    assert runner.run(plan("expert", "bitdelta"), Budget(None, 1))
    cells = {cell["method"]: cell for cell in runner.cells.cells()}
    assert set(cells) == {"expert", "bitdelta"}
    assert cells["expert"]["divergence"]["top1"] == 1
    assert cells["expert"]["linear_bytes"] == 2 * cells["expert"]["linear_weights"]
    assert 0 < cells["bitdelta"]["linear_bytes"] < cells["expert"]["linear_bytes"] / 8
    assert cells["bitdelta"]["rest_bytes"] == cells["expert"]["rest_bytes"] > 0
    assert cells["bitdelta"]["seconds"] >= 0

    measured = []
    score = Runner._score
    monkeypatch.setattr(Runner, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(Runner, "_score", lambda self, *a: measured.append(1) or score(self, *a))
    assert runner.run(plan("expert", "bitdelta"), Budget(None, 1))
    assert not measured
    assert runner.run(plan("expert", "bitdelta", "base"), Budget(None, 1))
    assert len(measured) == 1
    # Other settings make other cells.
    assert runner.run(plan("bitdelta", items=3), Budget(None, 1))
    assert len(measured) == 2


def test_what_departs_from_the_main_comparison_is_a_method_of_its_own(runner, tmp_path):
    write_split(tmp_path / "data", TASKS["json"], train=16, test=3)
    main_plan = plan("expert", "ours-2bit")
    other = plan("ours-2bit", calibration_task="json", exact_rest=False)
    assert runner.run(main_plan, Budget(None, 1))
    assert runner.run(other, Budget(None, 1))
    cells = {cell["method"]: cell for cell in runner.cells.cells()}
    assert set(cells) == {"expert", "ours-2bit", "ours-2bit+calibration-json+own-rest"}
    own = cells["ours-2bit+calibration-json+own-rest"]
    # The package quantises the rows of the embedding.
    assert 0 < own["rest_bytes"] < cells["ours-2bit"]["rest_bytes"]
    assert own["linear_bytes"] == cells["ours-2bit"]["linear_bytes"]
    assert own["divergence"] != cells["ours-2bit"]["divergence"]


def test_a_trained_expert_is_the_same_again_and_differs_from_another_seed(runner):
    runner.train(EXPERT, plan())
    first = runner.folder(EXPERT).load()
    runner.train(EXPERT, plan())
    again = runner.folder(EXPERT).load()
    assert all(torch.equal(first[key], again[key]) for key in first)
    # At this rate and in bfloat16, the norms stay at one.
    assert all(not torch.equal(first[key], runner.base_state[key]) for key in first if first[key].ndim == 2)
    runner.train(ExpertId("code", "light", 1), plan())
    other = runner.folder(ExpertId("code", "light", 1)).load()
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert set(runner.trainings()) == {"code-light-s0", "code-light-s1"}


def test_an_expert_trained_after_another_is_the_one_trained_alone(pair, tmp_path, monkeypatch):
    """With code that computes a little differently for each length it was compiled for, and so tells which."""
    compiled_for, kept_code = [], []

    def backend(graph, inputs):
        # Not int(value), which would have it compiled again for every other length.
        lengths = [value.node.hint for value in inputs if isinstance(value, torch.SymInt)]
        compiled_for.append(lengths)
        kept_code.append(not torch.compiler.config.force_disable_caches)
        scale = 1 + sum(lengths) / 1000
        return lambda *values: [out * scale if out.is_floating_point() else out for out in graph(*values)]

    def compile_layers(model):
        for layer in model.base_model.layers:
            layer.compile(dynamic=True, backend=backend)

    monkeypatch.setattr(quality_runner, "compile_layers", compile_layers)
    for task in ("code", "json"):
        write_split(tmp_path / "data", TASKS[task], train=16, test=3)
    other = ExpertId("json", "light", 0)

    def digests(work: str, *experts: ExpertId) -> list[str]:
        own = Runner(pair.base, tmp_path / work, tmp_path / "data", torch.device("cpu"), compiled=True)
        return [own.train(expert, plan())["digest"] for expert in experts]

    _, after = digests("both", other, EXPERT)
    assert compiled_for[0] != compiled_for[-1]
    assert digests("alone", EXPERT) == [after]
    assert not any(kept_code)


def test_it_stops_before_its_time_is_up_and_goes_on_later(runner):
    assert not runner.run(plan("expert"), Budget(0.5, guess=1.0))
    assert runner.trainings() == {}
    budget = Budget(1e6, guess=1.0)
    budget.spent("base", 1e9)
    assert not runner.run(plan("expert", "base", "bitdelta"), budget)
    assert [cell["method"] for cell in runner.cells.cells()] == ["expert"]
    assert runner.run(plan("expert", "base", "bitdelta"), Budget(None, 1.0))


def cell(expert: str, method: str, right: str, *, seed: int = 0, items: int = 8) -> dict:
    count = sum(bin(int(digit, 16)).count("1") for digit in right)
    return {
        "expert": expert,
        "task": expert.split("-")[0],
        "strength": expert.split("-")[1],
        "seed": seed,
        "method": method,
        "settings": {"items": items},
        "items": items,
        "right": count,
        "correct": right,
        "linear_bytes": 100,
        "rest_bytes": 10,
        "linear_weights": 400,
        "divergence": {"kl": 0.1, "top1": 0.9, "positions": 5},
    }


HEAD = {
    "device": "a device",
    "date": "2000-01-01",
    "versions": {"torch": "2", "transformers": "5"},
    "base": "a base",
    "methods": {},
    "plan": {},
}


def test_results_merge_and_the_last_counts():
    one = {**HEAD, "experts": {"a-light-s0": {"steps": 1}}, "cells": [cell("a-light", "expert", "00")]}
    two = {
        **HEAD,
        "experts": {"b-light-s0": {"steps": 1}},
        "cells": [
            cell("b-light", "expert", "ff"),
            cell("a-light", "expert", "f0"),
            cell("a-light", "expert", "f0", seed=1),
        ],
    }
    merged = merge([one, two])
    assert [(c["expert"], c["seed"], c["correct"]) for c in merged["cells"]] == [
        ("a-light", 0, "f0"),
        ("a-light", 1, "f0"),
        ("b-light", 0, "ff"),
    ]
    assert merge([merged, merged]) == merged
    assert set(merged["experts"]) == {"a-light-s0", "b-light-s0"}
    with pytest.raises(ValueError, match="a-light-s0 was trained twice"):
        merge([one, {**one, "experts": {"a-light-s0": {"steps": 2}}}])
    slower = {**one, "experts": {"a-light-s0": {"steps": 1, "seconds": 9.0}}}
    assert merge([slower, {**one, "experts": {"a-light-s0": {"steps": 1, "seconds": 8.0}}}])["cells"] == one["cells"]


def test_merging_keeps_versions_that_only_some_runs_have():
    first = {**HEAD, "versions": {"torch": "1", "bitsandbytes": "2"}, "experts": {}, "cells": []}
    merged = merge([first, {**first, "date": "later", "versions": {"torch": "3"}}])
    assert merged["versions"] == {"torch": "3", "bitsandbytes": "2"}
    assert merged["date"] == "later"


def test_the_tables_of_the_docs_are_those_of_the_published_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "quality_tables.md").read_text(encoding="utf-8").endswith("\n" + markdown(result))


def test_the_built_in_set_calibrates_as_another_task_does(runner):
    assert runner.run(plan("expert", "ours-2bit"), Budget(None, 1))
    assert runner.run(plan("ours-2bit", calibration=4, calibration_task="default"), Budget(None, 1))
    cells = {cell["method"]: cell for cell in runner.cells.cells()}
    built_in = cells["ours-2bit+calibration4+calibration-default"]
    assert built_in["linear_bytes"] == cells["ours-2bit"]["linear_bytes"]
    assert built_in["divergence"] != cells["ours-2bit"]["divergence"]


def test_the_report_pairs_items_and_pools_only_what_is_complete():
    cells = [
        cell("a-light", "expert", "ff"),
        cell("a-light", "x", "f7"),
        cell("b-light", "expert", "f0"),
        cell("b-light", "x", "f8"),
        cell("b-light", "y", "f0"),
        cell("b-light", "z", "f0", items=4),
    ]
    text = markdown({**HEAD, "experts": {}, "cells": cells})
    per_task, _, pooled = text.partition("## Pooled")
    rows = [line.split(" | ") for line in per_task.splitlines() if line.startswith("| x ")]
    assert [row[5] for row in rows] == ["+12.50 ± 24.50", "-12.50 ± 24.50"]
    assert rows[0][1:4] == ["100", "2.00", "110"]
    pooled_row = next(line for line in pooled.splitlines() if line.startswith("| x "))
    assert "+0.00 ±" in pooled_row
    assert "| y " not in pooled
    # Fewer items than the expert's are not paired with them.
    assert "–" in next(line for line in per_task.splitlines() if line.startswith("| z ")).split(" | ")[5]


def test_the_report_says_which_seeds_a_row_is_of():
    cells = [cell("a-light", method, "ff", seed=seed) for method, seed in (("expert", 0), ("expert", 1), ("x", 1))]
    text = markdown({**HEAD, "experts": {}, "cells": cells})
    per_task, _, pooled = text.partition("## Pooled")
    assert "## a-light, seeds 0, 1" in per_task
    assert "| x (seed 1) |" in per_task
    assert "| expert |" in per_task
    assert "### all experts of seed 0" in pooled


def test_a_cell_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    store = CellStore(tmp_path)
    store.write(EXPERT, "base", {"items": 1}, {"right": 1})
    assert store.has(EXPERT, "base", {"items": 1})
    assert not store.has(EXPERT, "base", {"items": 2})
    assert not store.has(EXPERT, "expert", {"items": 1})
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write(EXPERT, "base", {"items": 2}, {"right": 2})
    assert store.cells()[0]["right"] == 1


def test_unknown_experts_and_methods_are_named():
    with pytest.raises(ValueError, match="'math' is no expert"):
        ExpertId.parse("math", 0)
    for arguments in (["--methods", "expert,nonsense"], ["--experts", "math-medium"]):
        with pytest.raises(SystemExit):
            main(["run", "--work-dir", "nowhere", *arguments])


def test_a_digest_is_of_names_and_values():
    weights = {"a": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.bfloat16)}
    assert weights_digest(dict(reversed(weights.items()))) == weights_digest(weights)
    assert weights_digest({**weights, "a": weights["a"].clone().fill_diagonal_(1 + 1e-6)}) != weights_digest(weights)
    assert weights_digest({"b": weights["b"], "c": weights["a"]}) != weights_digest(weights)


def test_pieces_are_small_and_give_the_expert_back(pair, tmp_path):
    base, expert = pair.inputs.base, pair.inputs.expert
    paths = save_pieces(base, expert, tmp_path, piece_bytes=2500)
    assert len(paths) > 5
    for path in paths:
        assert path.stat().st_size < 2500 + 4000  # the header
    found = load_pieces(base, tmp_path)
    assert set(found) == set(expert)
    for key, value in expert.items():
        if value.ndim == 1:
            assert torch.equal(found[key], value)
            continue
        delta = value.float() - base[key].float()
        # Half a step of the delta, and half a unit in the last of bfloat16's 8 places.
        bound = delta.abs().amax(dim=1, keepdim=True) / 254 * 1.001 + found[key].float().abs() * 2**-8
        assert bool(((found[key].float() - value.float()).abs() <= bound).all())
    paths[2].unlink()
    with pytest.raises(ValueError, match="rows of"):
        load_pieces(base, tmp_path)


def test_an_expert_counts_as_trained_once_its_weights_are_whole(tmp_path):
    folder = ExpertFolder(tmp_path / "expert")
    assert folder.training() is None
    folder.save({"a": torch.ones(2)}, {"steps": 1})
    assert folder.training() == {"steps": 1}
    assert torch.equal(folder.load()["a"], torch.ones(2))


def test_heavy_is_heavier_than_light():
    assert STRENGTHS["heavy"].steps > STRENGTHS["light"].steps
    assert STRENGTHS["heavy"].learning_rate > STRENGTHS["light"].learning_rate


@pytest.mark.slow
def test_deltas_are_measured_over_a_quantised_base(runner, pair, tmp_path):
    pytest.importorskip("bitsandbytes")
    runner.train(EXPERT, plan())
    runner.run(plan("expert"), Budget(None, 1))
    measure_over_quantized_base(
        pair.base,
        tmp_path / "work",
        tmp_path / "data",
        [EXPERT],
        ["expert", "ours-2bit"],
        bits=8,
        items=4,
        device=torch.device("cpu"),
        calibration=8,
        batch_size=3,
        max_new_tokens=3,
    )
    cells = {cell["method"]: cell for cell in runner.cells.cells()}
    assert set(cells) == {"expert", "expert@8bit-base", "ours-2bit@8bit-base"}
    weights = cells["expert"]["linear_weights"]
    # Of the checkpoint, one byte a weight and a scale a row.
    assert weights < cells["expert@8bit-base"]["linear_bytes"] < 1.5 * weights
    assert cells["ours-2bit@8bit-base"]["linear_weights"] == weights
    found = ours(dataclasses.replace(pair.inputs, expert=runner.folder(EXPERT).load()), OURS["ours-2bit"])
    assert cells["ours-2bit@8bit-base"]["linear_bytes"] == found.linear_bytes
    head = {**HEAD, "experts": {}, "cells": list(cells.values())}
    assert "| ours-2bit@8bit-base |" in markdown(head)


@pytest.mark.slow
def test_everything_runs_through_on_a_tiny_base(tmp_path):
    result = tmp_path / "quality.json"
    run = ["run", "--smoke", "--work-dir", str(tmp_path / "work"), "--output", str(result)]
    main([*run, "--methods", "expert,base,bitdelta-distilled,mixed-svd-2bit,ours-2bit"])
    found = json.loads(result.read_text())
    assert len(found["cells"]) == 15
    assert len(found["experts"]) == 3
    assert str(tmp_path) not in result.read_text()
    main(["merge", str(result), str(result), "--output", str(tmp_path / "merged.json")])
    assert json.loads((tmp_path / "merged.json").read_text())["cells"] == found["cells"]
    report = ["report", str(result), "--markdown", str(tmp_path / "report.md")]
    pytest.importorskip("matplotlib")
    main([*report, "--plot", str(tmp_path / "accuracy.png")])
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    text = (tmp_path / "report.md").read_text()
    # Of each expert, of all, of each strength; and of those of the first seed, all and light.
    assert text.count("| ours-2bit |") == 3 + 3 + 2
