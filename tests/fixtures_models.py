"""A tiny family on disk that is a real one in everything but size, and its dense twin worked out independently.

``tiny_family`` is a tied two-layer Llama with a tokenizer and two fine-tunes: ``math`` keeps the base's vocabulary,
``code`` adds four tokens and brings its own EOS and chat template. Both are compressed once per test session, one with
exact embedding rows and the other with quantised ones, so that every test meets both kinds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import transformers_meswitch as meswitch

VOCAB_SIZE = 128
ADDED_TOKENS = ["<add-0>", "<add-1>", "<add-2>", "<add-3>"]
CODE_VOCAB_SIZE = VOCAB_SIZE + len(ADDED_TOKENS)
BASE_EOS, CODE_EOS = 2, VOCAB_SIZE + 1
CODE_TEMPLATE = "{% for m in messages %}<add-2>{{ m['content'] }}{% endfor %}"
#: Rows of the embedding that each fine-tune changes; the others stay bitwise the base's.
CHANGED_ROWS = {"math": (5, 40, 90), "code": (7, 41, 127)}
#: A linear that ``math`` leaves as it is, so that its delta has no record for it.
UNCHANGED_IN_MATH = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class TinyFamily:
    """Folders of a base, its fine-tunes as full checkpoints, and their deltas."""

    base: Path
    experts: dict[str, Path]
    deltas: dict[str, Path]


def llama_config(**overrides: Any) -> LlamaConfig:
    """Two layers of 64, with grouped queries; large weights, so that greedy answers differ between experts.

    Widths are multiples of 64, the block that bitsandbytes quantises on a CPU.
    """
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": BASE_EOS,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "dtype": "float32",
    }
    return LlamaConfig(**{**defaults, **overrides})


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: ids 33 to 126 are ASCII, the rest ``<id>``."""
    vocabulary = {chr(i) if 33 <= i < 127 else f"<{i}>": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<3>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<1>",
        eos_token="<2>",
        pad_token="<0>",
        unk_token="<3>",
        padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def fine_tune(model: Any, seed: int, changed_rows: tuple[int, ...], unchanged: tuple[str, ...] = ()) -> None:
    """Change a model in place as a full fine-tune would: linears, norms and biases all over, some embedding rows."""
    torch.manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape).to(parameter.dtype) * 0.05
            if parameter is embedding or (name == "lm_head.weight"):
                rows = list(changed_rows)
                parameter[rows] += 4 * noise[rows]
            elif not name.startswith(unchanged or ("\0",)):
                parameter += noise


def build_tiny_family(
    folder: Path, quantized_rows: str = "code", unchanged: str = UNCHANGED_IN_MATH, **config: Any
) -> TinyFamily:
    """Write a family into ``folder``; ``config`` overrides :func:`llama_config`.

    The embedding and head of the expert ``quantized_rows`` are quantised, those of the other one exact.
    ``unchanged`` is the linear that ``math`` leaves as it is.
    """
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    family = TinyFamily(
        folder / "base",
        {name: folder / f"expert-{name}" for name in ("math", "code")},
        {name: folder / f"delta-{name}" for name in ("math", "code")},
    )
    LlamaForCausalLM(llama_config(**config)).save_pretrained(family.base)
    tokenizer.save_pretrained(family.base)
    for seed, (name, path) in enumerate(family.experts.items(), start=100):
        model = LlamaForCausalLM.from_pretrained(family.base)
        rows: tuple[int, ...] = CHANGED_ROWS[name]
        if name == "code":
            model.resize_token_embeddings(CODE_VOCAB_SIZE, mean_resizing=False)
            model.config.eos_token_id = model.generation_config.eos_token_id = CODE_EOS
            tokenizer.add_special_tokens({"additional_special_tokens": ADDED_TOKENS})
            tokenizer.eos_token = ADDED_TOKENS[CODE_EOS - VOCAB_SIZE]
            tokenizer.chat_template = CODE_TEMPLATE
            rows = (*rows, *range(VOCAB_SIZE, CODE_VOCAB_SIZE))
        fine_tune(model, seed, rows, (unchanged,) if name == "math" else ())
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        embedding_bits = 3 if name == quantized_rows else None
        how = meswitch.MESwitchConfig(bits=4, salient_channels=4, embedding_bits=embedding_bits)
        meswitch.compress(family.base, path, family.deltas[name], how, calibration=None, progress=False)
    return family


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """The family described above. Tests must not write into its folders."""
    return build_tiny_family(tmp_path_factory.mktemp("tiny-family"))


@pytest.fixture(scope="session")
def untied_family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """The same with an output head of its own, in base and experts; ``math`` has the quantised rows."""
    return build_tiny_family(tmp_path_factory.mktemp("untied-family"), "math", tie_word_embeddings=False)


def unpacked(codes: torch.Tensor, bits: int, channels: int) -> torch.Tensor:
    """Codes of a packed matrix, bit by bit as ``docs/delta_format.md`` words it: uint8 ``[out, bytes]`` to int64."""
    out = torch.zeros(codes.shape[0], channels, dtype=torch.int64)
    for i in range(channels):
        for bit in range(bits):
            place = i * bits + bit
            out[:, i] |= ((codes[:, place // 8].long() >> (place % 8)) & 1) << bit
    return out


def dense_delta(record: dict[str, Any], leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight delta ``[out, in]`` float32 that a linear's leaves stand for, from the format's definition."""
    salient = leaves.get("salient_index", torch.zeros(0, dtype=torch.int32)).long()
    coded = [i for i in range(record["in_features"]) if i not in set(salient.tolist())]
    levels = (2 * unpacked(leaves["codes"], record["bits"], len(coded)) + 1 - 2 ** record["bits"]) / 2
    delta = torch.zeros(record["out_features"], record["in_features"])
    delta[:, coded] = levels * leaves["step"][:, None] * leaves.get("column_step", torch.ones(len(coded)))
    if len(salient):
        delta[:, salient] = leaves["salient"].float()
    return delta


def change_rows(weight: torch.Tensor, record: dict[str, Any], leaves: dict[str, torch.Tensor]) -> None:
    """Turn a base's matrix, already of as many rows as the expert's, into the expert's, by the format's definition."""
    exact = leaves.get("exact_index", torch.zeros(0, dtype=torch.int32)).tolist()
    rest = [row for row in range(record["num_rows"]) if row not in exact]
    coded = leaves["row_index"].tolist() if "row_index" in leaves else rest
    change = dense_delta({**record, "out_features": record["coded_rows"], "in_features": record["width"]}, leaves).to(
        weight.device
    )
    for place, row in enumerate(coded):
        weight[row] = weight[row].float() + change[place]
    for place, row in enumerate(exact):
        weight[row] = leaves["rows"][place].to(weight.device)


def dense_model(base: Path, delta: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A stock model with the weights base + delta, worked out from the files without this package's code.

    The base is rounded to ``dtype`` first, as a base loaded in it is; the sum is formed in float32 and rounded once.
    """
    config = json.loads((delta / "adapter_config.json").read_text())
    stored = load_file(delta / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).float()
    if config["tie_word_embeddings"] != model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = config["tie_word_embeddings"]
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    if config["vocab_size"] != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(config["vocab_size"], mean_resizing=False)
    with torch.no_grad():
        for name, record in config["modules"].items():
            prefix = f"base_model.model.{name}.meswitch_delta."
            leaves = {key[len(prefix) :]: tensor for key, tensor in stored.items() if key.startswith(prefix)}
            module = model.get_submodule(name)
            if record["kind"] == "linear":
                change = dense_delta(record, leaves)
                module.weight += change.T if type(module).__name__ == "Conv1D" else change
            elif record["kind"] == "quantized_rows":
                change_rows(module.weight, record, leaves)
            elif record["kind"] == "rows":
                module.weight[leaves["row_index"].long()] = leaves["rows"].float()
            else:
                for parameter in record["shapes"]:
                    getattr(module, parameter).copy_(leaves[f"values.{parameter}"])
            if "bias" in leaves:
                module.bias.copy_(leaves["bias"])
    model.generation_config = GenerationConfig.from_pretrained(delta)
    return model.to(dtype).eval()


def hooked_model(base: Path, delta: Path, **arguments: Any) -> Any:
    """A stock base, quantised or not; its linears gain ``x Δᵀ`` with the files' dense Δ, the rest is the expert's."""
    config = json.loads((delta / "adapter_config.json").read_text())
    stored = load_file(delta / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, **arguments)
    model.resize_token_embeddings(config["vocab_size"], mean_resizing=False)
    for name, record in config["modules"].items():
        prefix = f"base_model.model.{name}.meswitch_delta."
        leaves = {key[len(prefix) :]: tensor for key, tensor in stored.items() if key.startswith(prefix)}
        module = model.get_submodule(name)
        weight = module.weight
        if record["kind"] == "linear":
            change = dense_delta(record, leaves).to(weight.device)
            module.register_forward_hook(
                lambda _, x, y, change=change: y + nn.functional.linear(x[0], change.to(x[0].dtype)).to(y.dtype)
            )
        elif record["kind"] == "quantized_rows":
            change_rows(weight.data, record, leaves)
        elif record["kind"] == "rows":
            weight.data[leaves["row_index"].long().to(weight.device)] = leaves["rows"].to(weight.device, weight.dtype)
        else:
            weight.data.copy_(leaves["values.weight"])
    model.generation_config = GenerationConfig.from_pretrained(delta)
    return model
