"""The size benchmark: its prediction against files really written, the published ratios, the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.size.__main__ import main, rows_of
from benchmarks.size.architectures import ARCHITECTURES, ROUTER, on_meta
from benchmarks.size.others import dense_bytes, paper_delta, parameter_count
from benchmarks.size.ours import config_bytes, records_of, weights_bytes
from transformers_meswitch import MESwitchConfig, compress
from transformers_meswitch.compression.expert_config import expert_config
from transformers_meswitch.delta_format.fingerprint import fingerprint_checkpoint
from transformers_meswitch.inspection import inspect_delta

SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SMALL, intermediate_size=40, num_key_value_heads=1, tie_word_embeddings=False)
QWEN = Qwen2Config(**SMALL, intermediate_size=40, num_key_value_heads=1, tie_word_embeddings=True)
GPT2 = GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=11, n_head=2)
SAFETENSORS_NAME = {torch.bfloat16: "BF16", torch.float32: "F32"}


def fine_tune(config: PreTrainedConfig, folder: Path, dtype: torch.dtype, *, rows: bool) -> tuple[Path, Path]:
    """A base and an expert that differs in every parameter, or in all but embedding and output head."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "base")
    kept = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)} if not rows else set()
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(folder / "expert")
    return folder / "base", folder / "expert"


@pytest.mark.parametrize(
    ("architecture", "dtype", "config", "rows"),
    [
        (LLAMA, torch.bfloat16, MESwitchConfig(bits=1, salient_channels=3), True),
        (LLAMA, torch.bfloat16, MESwitchConfig(bits=2), False),
        (LLAMA, torch.float32, MESwitchConfig(bits=2, salient_channels=0, column_steps=True), True),
        (QWEN, torch.bfloat16, MESwitchConfig(bits=3, salient_channels=64, layer_bits={"down_proj$": 4}), True),
        (QWEN, torch.bfloat16, MESwitchConfig(bits=1), False),
        (GPT2, torch.bfloat16, MESwitchConfig(bits=4), True),
        (LLAMA, torch.bfloat16, MESwitchConfig(bits=2, salient_channels=2, embedding_bits=None), True),
        (QWEN, torch.bfloat16, MESwitchConfig(bits=2, salient_channels=0, embedding_bits=1), True),
        (GPT2, torch.float32, MESwitchConfig(bits=1, salient_channels=5, embedding_bits=4), True),
    ],
)
def test_predicted_bytes_are_the_bytes_on_disk(architecture, dtype, config, rows, tmp_path):
    base, expert = fine_tune(architecture, tmp_path, dtype, rows=rows)
    delta = compress(base, expert, tmp_path / "delta", config, calibration=None, progress=False)
    model = on_meta(architecture)
    records = records_of(model, config, rows=rows, own_dtype=SAFETENSORS_NAME[dtype])
    assert (delta / "adapter_model.safetensors").stat().st_size == weights_bytes(records, SAFETENSORS_NAME[dtype])
    predicted = expert_config(
        config,
        records,
        base=base,
        base_revision=None,
        base_fingerprint=fingerprint_checkpoint([base / "model.safetensors"]),
        expert=expert,
        model_config=model.config,
        generation_config=model.generation_config,
        vocab_size=61,
        tied=architecture.tie_word_embeddings,
        calibrated=False,
    )
    assert (delta / "adapter_config.json").stat().st_size == config_bytes(predicted)


def test_inspection_totals_are_the_files(tmp_path):
    base, expert = fine_tune(LLAMA, tmp_path, torch.bfloat16, rows=True)
    delta = compress(base, expert, tmp_path / "delta", calibration=None, progress=False)
    inspection = inspect_delta(delta)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert inspection.files == {name: (delta / name).stat().st_size for name in names}
    assert inspection.total_bytes == inspection.tensor_bytes + inspection.overhead_bytes
    assert inspection.dense_bytes == 2 * parameter_count(on_meta(LLAMA))


def test_published_sizes_of_the_architectures():
    counts = {base: parameter_count(on_meta(config)) for base, config in ARCHITECTURES.items()}
    assert counts == {
        "mistralai/Mistral-7B-v0.1": 7_241_732_096,
        "meta-llama/Llama-3.1-8B": 8_030_261_248,
        "Qwen/Qwen2.5-7B": 7_615_616_512,
    }
    assert parameter_count(on_meta(ROUTER)) == 1_836_828_672


def test_the_papers_ratios():
    mistral = on_meta(ARCHITECTURES["mistralai/Mistral-7B-v0.1"])
    full, delta, router = dense_bytes(mistral), paper_delta(mistral), dense_bytes(on_meta(ROUTER))
    assert round(3 * full / (full + 3 * delta), 2) == 2.04
    assert round(3 * full / (full + 3 * delta + router), 2) == 1.74


def test_table_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.size.__main__.ARCHITECTURES", {"me/tiny": LLAMA})
    monkeypatch.setattr(sys, "argv", ["size", "--output", str(tmp_path / "size.json")])
    main()
    result = json.loads((tmp_path / "size.json").read_text())
    assert {"command", "date", "device", "versions", "assumptions", "rows"} <= set(result)
    assert len(result["rows"]) == 15
    assert capsys.readouterr().out.count("\n") == 17


def test_rows_agree_with_themselves():
    for row in rows_of("me/tiny", on_meta(LLAMA), router=100):
        extra = 100 if row["scheme"].endswith("with router") else 0
        assert row["stored_bytes_16"] == row["full_copy_bytes"] + 16 * row["delta_bytes"] + extra
        assert row["ratio_16"] == pytest.approx(16 * row["full_copy_bytes"] / row["stored_bytes_16"], abs=1e-4)
