"""What may differ between the configurations of a base and of its fine-tune, and what makes another model of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from tests.fixtures_models import TinyFamily, llama_config
from tests.model_state import prompt
from transformers_meswitch import MESwitchConfig, compress
from transformers_meswitch.compression.architecture import differences
from transformers_meswitch.errors import CompressionError

HOW = {"bits": 4, "salient_channels": 4}


def with_config(checkpoint: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of a checkpoint with some keys of its ``config.json`` changed; `None` removes one."""
    copy = Path(shutil.copytree(checkpoint, folder))
    config = json.loads((copy / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def by_compress(base: Path, expert: Path, out: Path) -> None:
    compress(base, expert, out, MESwitchConfig(**HOW), calibration=None, progress=False)


def on_load(base: Path, expert: Path, out: Path) -> None:
    how = MESwitchConfig(str(base), **HOW)
    # Left to itself, transformers loads in the dtype that config.json names, which rounds the expert.
    AutoModelForCausalLM.from_pretrained(expert, quantization_config=how, dtype="float32").save_pretrained(out)


ROUTES = pytest.mark.parametrize("produce", [by_compress, on_load])

OTHER_MODELS = {
    "rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        r"rope_parameters\.rope_theta is 50\.0 in the expert but 10000\.0 in the base",
    ),
    "scaled rope, spelt as of old": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
        r"rope_parameters\.factor is 4\.0 in the expert but None in the base; "
        r"rope_parameters\.rope_type is 'linear' in the expert but 'default' in the base",
    ),
    "heads": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
        r"num_attention_heads is 8 in the expert but 4 in the base; num_key_value_heads is 4 .* but 2 .*head_dim is 8",
    ),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act is 'gelu' in the expert but 'silu' in the base"),
    "epsilon": ({"rms_norm_eps": 0.01}, r"rms_norm_eps is 0\.01 in the expert but 1e-06 in the base"),
}


@ROUTES
@pytest.mark.parametrize("what", OTHER_MODELS)
def test_an_expert_that_computes_something_else_is_refused(
    what: str, produce: Any, tiny_family: TinyFamily, tmp_path: Path
) -> None:
    changes, message = OTHER_MODELS[what]
    expert = with_config(tiny_family.experts["math"], tmp_path / "expert", changes)
    stock, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_family.experts["math"], expert))
    assert not torch.allclose(stock(prompt()).logits, other(prompt()).logits), "the change changes nothing"
    with pytest.raises(
        CompressionError, match=f"{message}.*A delta holds weights only.*Give the base that the expert"
    ):
        produce(tiny_family.base, expert, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


HARMLESS = {
    "architectures": ["SomethingElse"],
    "attention_dropout": 0.1,
    "bos_token_id": 5,
    "dtype": "float16",
    "eos_token_id": [2, 7],
    "head_dim": None,
    "hidden_act": "swish",
    "initializer_range": 0.5,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "pretraining_tp": 2,
    "rms_norm_eps": None,
    "rope_parameters": None,
    "rope_scaling": {"type": "default", "factor": 8.0},
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "unsloth_version": "2024.9",
    "use_cache": False,
}


@ROUTES
def test_harmless_differences_pass_and_change_nothing(produce: Any, tiny_family: TinyFamily, tmp_path: Path) -> None:
    expert = with_config(tiny_family.experts["math"], tmp_path / "expert", HARMLESS)
    produce(tiny_family.base, expert, tmp_path / "delta")
    produce(tiny_family.base, tiny_family.experts["math"], tmp_path / "plain")
    found, expected = (tmp_path / name / "adapter_model.safetensors" for name in ("delta", "plain"))
    assert found.read_bytes() == expected.read_bytes()


def test_a_quantizer_s_model_has_the_whole_config_of_the_base(tiny_family: TinyFamily, tmp_path: Path) -> None:
    expert = with_config(tiny_family.experts["code"], tmp_path / "expert", HARMLESS)
    how = MESwitchConfig(str(tiny_family.base), **HOW)
    model = AutoModelForCausalLM.from_pretrained(expert, quantization_config=how, dtype=torch.bfloat16)
    shared = model.config
    model.delete_adapter("default")
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, dtype=torch.bfloat16)
    assert model.config.to_dict() == base.config.to_dict()
    assert model.config is shared is model.model.config is model.model.layers[0].self_attn.config
    assert torch.equal(model(prompt()).logits, base(prompt()).logits)


SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 128}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def phi3(length: int, **rope: Any) -> Phi3Config:
    return Phi3Config(
        **SIZES,
        pad_token_id=0,
        max_position_embeddings=length,
        original_max_position_embeddings=128,
        rope_parameters={**LONG, "rope_theta": 1e4, **rope},
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (llama_config(rope_parameters={"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4}), llama_config()),
        (llama_config(rope_parameters={"rope_theta": 10000, "partial_rotary_factor": 1.0}), llama_config()),
        (LlamaConfig(num_key_value_heads=None), LlamaConfig(num_key_value_heads=32, head_dim=128)),
        (Qwen2Config(sliding_window=512, max_window_layers=3), Qwen2Config(sliding_window=None)),
        (Qwen2Config(layer_types=["full_attention"] * 32), Qwen2Config(max_window_layers=70)),
        (GPT2Config(n_positions=512, n_inner=None, attn_pdrop=0.5), GPT2Config(n_inner=3072, summary_type="mean")),
        (GPT2Config(activation_function="gelu_fast"), GPT2Config(activation_function="gelu_new")),
        (
            llama_config(max_position_embeddings=512, rope_parameters={**YARN, "factor": 4.0}),
            llama_config(max_position_embeddings=256, rope_parameters={**YARN, "factor": 4.0}),
        ),
        (phi3(256, factor=2.0), phi3(512, factor=2.0)),
        (
            Gemma3TextConfig(**SIZES, attention_dropout=0.2, bos_token_id=9),
            Gemma3TextConfig(**SIZES, max_position_embeddings=64),
        ),
    ],
)
def test_equal_meanings_are_equal(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> None:
    assert list(differences(ours, theirs)) == list(differences(theirs, ours)) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "keys"),
    [
        (LlamaConfig(num_hidden_layers=3, mlp_bias=True), LlamaConfig(), ["num_hidden_layers", "mlp_bias"]),
        (MistralConfig(sliding_window=None), MistralConfig(sliding_window=4096), ["sliding_window"]),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=512, max_window_layers=2),
            Qwen2Config(**SIZES),
            ["layer_types", "sliding_window"],
        ),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=512, max_window_layers=2),
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=256, max_window_layers=2),
            ["sliding_window"],
        ),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), GPT2Config(), ["scale_attn_by_inverse_layer_idx"]),
        (
            llama_config(max_position_embeddings=512, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            llama_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            ["max_position_embeddings"],
        ),
        (
            llama_config(rope_parameters={**YARN, "factor": 4.0, "beta_fast": 16}),
            llama_config(rope_parameters={**YARN, "factor": 4.0}),
            ["rope_parameters.beta_fast"],
        ),
        (phi3(256), phi3(512), ["max_position_embeddings"]),
        (
            Gemma3TextConfig(**SIZES, rope_theta=1e4, final_logit_softcapping=30.0),
            Gemma3TextConfig(**SIZES),
            ["final_logit_softcapping", "rope_parameters.full_attention.rope_theta"],
        ),
    ],
)
def test_other_meanings_are_named(ours: PreTrainedConfig, theirs: PreTrainedConfig, keys: list[str]) -> None:
    assert sorted(key for key, *_ in differences(ours, theirs)) == sorted(keys)
    assert sorted(key for key, *_ in differences(theirs, ours)) == sorted(keys)
