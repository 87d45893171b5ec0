"""The Hub benchmark: each way moves the same delta, ratios are of the same turn, bytes are what the server sent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import MistralConfig

from benchmarks.hub import __main__ as benchmark

pytestmark = pytest.mark.integration

TINY = MistralConfig(
    vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip


def test_every_way_moves_the_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SHAPE", TINY)
    monkeypatch.setitem(benchmark.SHAPES, "deep", TINY)
    monkeypatch.setitem(benchmark.LAYOUTS, "shards", "60KB")
    monkeypatch.setattr(sys, "argv", ["hub", "--turns", "2", "--output", str(tmp_path / "result.json")])
    benchmark.main()
    result = json.loads((tmp_path / "result.json").read_text())
    second = result["second_expert"]
    assert second["second_expert_bytes"] == second["its_delta_bytes"] > 5_000
    rows = {(row["action"], row["layout"]): row for row in result["rows"]}
    assert rows.keys() == {(action, layout) for action in ("push", "pull") for layout in ("one file", "shards")}
    for (action, layout), row in rows.items():
        for way, turns in row["turns"].items():
            assert len(turns) == 2
            moved = "sent_bytes" if action == "push" else "received_bytes"
            for turn in turns:
                assert way == "bare" or row["bytes"] <= turn[moved] < 2 * row["bytes"], "once, and some JSON"
                assert (turn["requests"] == 0) == (way == "bare")
        uploads = 1 if layout == "one file" else 5
        assert row["turns"]["plain"][0]["requests"] > uploads
    plain, ours = (rows["pull", "shards"]["turns"][way] for way in ("plain", "ours"))
    ratios = sorted(p["seconds"] / o["seconds"] for p, o in zip(plain, ours, strict=True))
    assert rows["pull", "shards"]["share_of_plain"] == pytest.approx(sum(ratios) / 2, rel=1e-3)
    assert f"A second expert: {second['second_expert_bytes']:,} bytes sent" in capsys.readouterr().out
