"""The decode benchmark: every row there is on a device without graphs, and a step that looks at what it ought to."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.decode import __main__ as benchmark
from benchmarks.decode import step
from benchmarks.decode.step import DecodeStep
from benchmarks.load.random_family import random_expert
from transformers_meswitch import MESwitchConfig

TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=512,
)  # fmt: skip


def test_every_row_is_there(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "deep", TINY)
    monkeypatch.setattr(sys, "argv", ["decode", "--experts", "2", "--output", str(tmp_path / "result.json")])
    benchmark.main()
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [
        "the plain base, 1 rows",
        "the plain base, 2 rows",
        "one expert, 1 row",
        "one expert, 2 rows",
        "2 experts, a row each",
        "2 LoRA adapters of rank 64, a row each, PEFT, called",
    ]
    assert all(row["milliseconds"] > 0 for row in rows), rows
    assert rows[2]["read_bytes"] > rows[0]["read_bytes"]
    assert rows[4]["read_bytes"] - rows[0]["read_bytes"] == 2 * (rows[2]["read_bytes"] - rows[0]["read_bytes"])
    assert capsys.readouterr().out.count("\n|") == len(rows) + 1


def test_compiled_steps_are_of_base_and_experts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    called: list[int] = []

    def compiled(model: Any, **options: Any) -> Any:
        number = len(asked)
        asked.append(options)
        called.append(0)

        def call(*args: Any, **kwargs: Any) -> Any:
            called[number] += 1
            return model(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setitem(benchmark.SHAPES, "deep", TINY)
    monkeypatch.setattr(sys, "argv", ["decode", "--experts", "2", "--compile"])
    benchmark.main()
    result = json.loads((tmp_path / "decode_deep_cpu_compiled.json").read_text())
    assert result["compiled"]
    assert [row["what"] for row in result["rows"]][-1] == "2 experts, a row each"
    # Two rows of the base, and of experts each with the base's step beside it.
    assert len(result["rows"]) == 5
    assert asked == [{"fullgraph": True, "dynamic": False}] * (2 + 3 * 2)
    for row in result["rows"][2:]:
        assert row["ratio_to_base"] == row["milliseconds"] / row["base_milliseconds"]
    # All that is timed, and nothing else.
    assert called == [step._REPEATS + 3] * len(asked)


def test_a_step_sees_the_tokens_before_it() -> None:
    model: Any = benchmark.random_model(TINY, "cpu").float()
    one = DecodeStep(model, 2, graph=False)
    one()
    seen = one.logits
    alone = model(one._tokens).logits
    assert seen.shape == alone.shape
    assert not torch.allclose(seen, alone, atol=1e-3)


def test_random_experts_differ_from_the_base_everywhere() -> None:
    model: Any = benchmark.random_model(TINY, "cpu").float()
    delta, tensors = random_expert(TINY, MESwitchConfig(bits=2, salient_channels=4), 0, rows_bits=3)
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.load_adapter(adapter_name="a", peft_config=delta, adapter_state_dict=tensors)
    merged = dict(model.merge_and_unload().named_parameters())
    assert merged.keys() == base.keys()
    assert not [name for name in base if torch.equal(merged[name], base[name])]
