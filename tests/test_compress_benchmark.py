"""The random pair of ``benchmarks.compress`` is what it says, and the benchmark runs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.compress import __main__ as benchmark
from benchmarks.compress import random_pair


@pytest.fixture
def tiny(monkeypatch):
    small = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = random_pair.shape_of("mistral-7b", 3)
    config.update(small | {"num_key_value_heads": 2, "head_dim": 8})
    monkeypatch.setitem(random_pair.SHAPES, "small", config)
    return config


def test_the_pair_differs_in_linears_and_norms_only(tiny, tmp_path):
    random_pair.write_pair(tmp_path / "base", tmp_path / "expert", random_pair.shape_of("small", 2), "cpu")
    base, expert = (AutoModelForCausalLM.from_pretrained(tmp_path / who) for who in ("base", "expert"))
    assert base.config.num_hidden_layers == 2
    theirs = dict(base.named_parameters())
    for name, parameter in expert.named_parameters():
        changed = not torch.equal(parameter, theirs[name])
        assert changed is ("layers" in name or name == "model.norm.weight"), name
    first, second = (base.model.layers[i].mlp.up_proj.weight for i in range(2))
    assert not torch.equal(first, second)
    assert 0.015 < float(first.detach().float().std()) < 0.025
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "expert")
    assert max(tokenizer("The quick brown fox.")["input_ids"]) < 160


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a process there keeps the id of a parent that is gone")
def test_a_measured_process_ends_with_the_one_that_started_it():
    watch = (
        "import sys, time; from benchmarks.compress.one_run import end_with; end_with(int(sys.argv[1])); time.sleep(3)"
    )
    # Told of another parent than it has, it finds that one gone.
    for parent, code in ((os.getpid(), 0), (os.getppid(), 1)):
        assert subprocess.run([sys.executable, "-c", watch, str(parent)], timeout=120).returncode == code


@pytest.mark.slow
def test_the_benchmark_writes_time_memory_and_provenance(tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    arguments = ["--shape", "small", "--layers", "1", "--tokens", "256", "--bits", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.compress", *arguments])
    benchmark.main()
    result = json.loads(output.read_text())
    assert result["weights"].startswith("random")
    assert str(tmp_path) not in result["command"]
    read, plain, calibrated = result["rows"]
    assert read["mb_per_second"] == pytest.approx(result["checkpoint_bytes"] / 1e6 / read["seconds"])
    for row in (plain, calibrated):
        assert row["seconds"] > 0
        assert row["peak_bytes"] >= row["start_bytes"] > 0
        assert row["delta_bytes"] > 0
    assert calibrated["what"] == "calibrated on 256 tokens"
    assert "| not calibrated |" in capsys.readouterr().out
