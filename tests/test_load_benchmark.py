"""The load benchmark: every row there is, with what cannot be measured named, and peaks of each load alone."""

from __future__ import annotations

import json
import sys

import pytest
from transformers import LlamaConfig
from transformers.integrations import PeftAdapterMixin

from benchmarks.load import __main__ as benchmark

TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the benchmark on a tiny shape; its rows by name, and what it printed."""

    def measure():
        monkeypatch.setitem(benchmark.SHAPES, "deep", TINY)
        monkeypatch.setattr(sys, "argv", ["load", "--experts", "2", "--output", str(tmp_path / "result.json")])
        benchmark.main()
        rows = json.loads((tmp_path / "result.json").read_text())["rows"]
        return {row["what"]: row for row in rows}, capsys.readouterr().out

    return measure


def test_a_refusal_by_transformers_is_a_row_like_another(run, monkeypatch):
    def refuse(*_):
        raise ValueError("The version of PEFT is not compatible")

    monkeypatch.setattr(PeftAdapterMixin, "set_adapter", refuse)
    rows, printed = run()
    assert rows[benchmark.STOCK] == {
        "what": benchmark.STOCK,
        "unavailable": "ValueError: The version of PEFT is not compatible",
    }
    assert "unavailable: ValueError: The version of PEFT" in printed
    assert next(what for what in rows if "generate, 1 token" in what) == benchmark.PLAIN
    assert all("unavailable" not in row for what, row in rows.items() if what != benchmark.STOCK)
    assert rows["load_adapter(expert-1)"]["bytes_on_disk"] > 0


def test_ratios_are_to_the_like(run, monkeypatch):
    monkeypatch.setattr(PeftAdapterMixin, "set_adapter", lambda *_: None)
    rows, printed = run()
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in printed.splitlines()}
    for what, reference, unit in (
        ("load_adapter(expert-0)", benchmark.BASE_LOAD, "seconds"),
        ("set_expert", benchmark.STOCK, "median_us"),
        ("generate, 1 token, the same expert each call", benchmark.PLAIN, "median_us"),
    ):
        assert float(lines[what][2]) == pytest.approx(rows[what][unit] / rows[reference][unit], rel=1e-3)


def test_a_peak_is_not_that_of_an_earlier_load(tmp_path):
    if not benchmark.reset_peak("cpu"):
        pytest.skip("the kernel does not reset peaks")
    _, large = benchmark.load("large", tmp_path, lambda: len(b"x" * 400_000_000), "cpu")
    _, small = benchmark.load("small", tmp_path, lambda: None, "cpu")
    assert small["peak_bytes"] < large["peak_bytes"] - 300_000_000
