"""All stages of the example on a tiny model: nothing is learnt, every number has its place."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import run
from tasks import TASKS, Item, split_path, write_split


@pytest.mark.slow
def test_every_stage_leaves_its_numbers(tiny_base, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    shutil.copytree(tiny_base, work / "base")
    (work / "stages").mkdir()
    (work / "stages" / "base.json").write_text("null")
    for name in TASKS:
        for part, count in (("train", 8), ("test", 3)):
            items = [Item(f"{part} {name} {i}?", f"#### {i}" if name == "math" else '{"a": 1}') for i in range(count)]
            write_split(split_path(work / "data", name, part), items)
    arguments = ["--work-dir", str(work), "--device", "cpu", "--steps", "2", "--batch-size", "4"]
    arguments += ["--train-items", "8", "--test-items", "3", "--output-json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--transcript", str(tmp_path / "page.md")])
    run.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert str(tmp_path) not in result["command"]
    assert [(row["task"], row["of"]) for row in result["paired"]] == [("math", 3)] * 2 + [("json", 3)] * 2
    assert [(row["task"], row["of"]) for row in result["identical_texts"]] == [("math", 3), ("json", 3)]
    rows = result["mixed_batch"]
    assert {row["expert"] for row in rows} == {"math", "json", None}
    assert all(set(row["right"]) == {"answer", "full-precision expert", "base"} for row in rows if row["expert"])
    page = (tmp_path / "page.md").read_text()
    assert "## Lost and won" in page
    assert "## Lost and won" in capsys.readouterr().out
