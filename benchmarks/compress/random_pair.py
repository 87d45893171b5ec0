"""A base and a fine-tune of a given shape with random weights, on disk: for time and memory, never for accuracy."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks.load.random_family import SHAPES as load_shapes
from transformers_meswitch.compression.sources import meta_model
from transformers_meswitch.delta_format.serialize import write_tensors

__all__ = ["SHAPES", "shape_of", "write_pair"]

SHAPES: dict[str, PreTrainedConfig] = {
    "small": LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=2048,
    ),
    "mistral-7b": load_shapes["mistral-7b"],
}  # fmt: skip

#: Files written at a time, each with a tensor of up to 0.5 GB in float32 in the making.
_WRITERS = 4


def shape_of(name: str, layers: int | None) -> PreTrainedConfig:
    """The configuration of a shape, with another number of layers if one is given."""
    config = copy.deepcopy(SHAPES[name])
    config.dtype = torch.bfloat16
    config.architectures = ["MistralForCausalLM" if config.model_type == "mistral" else "LlamaForCausalLM"]
    config.num_hidden_layers = layers or config.num_hidden_layers
    return config


def write_pair(base: Path, expert: Path, config: PreTrainedConfig, device: str) -> None:
    """Write bfloat16 checkpoints, a file a layer and a few of them at a time; the expert's has a tokenizer.

    Weights are normal with a deviation of 0.02; the expert's differ from the base's by a tenth of that in every
    element of the linears and norms. The embedding and head are equal, as after a fine-tuning that froze them.
    """
    model = meta_model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fixed = ("model.embed_tokens.weight", "lm_head.weight")
    shards = {f"model-{i:05}.safetensors": names for i, names in enumerate(_shards(shapes, config.num_hidden_layers))}
    weight_map = {name: file for file, names in shards.items() for name in names}
    for folder in (base, expert):
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer().save_pretrained(expert)

    def write(folder: Path, file: str) -> None:
        def weights(name: str) -> torch.Tensor:
            return _weights(name, shapes[name], folder == expert and name not in fixed, device)

        write_tensors(
            folder / file, {name: ("BF16", shapes[name]) for name in shards[file]}, weights, {"format": "pt"}
        )

    with ThreadPoolExecutor(_WRITERS) as writers:
        pending = [writers.submit(write, folder, file) for folder in (base, expert) for file in shards]
        try:
            for written in pending:
                written.result()
        finally:
            writers.shutdown(cancel_futures=True)  # interrupted, the rest is of no use
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes that are measured


def _shards(shapes: dict[str, tuple[int, ...]], layers: int) -> Iterator[list[str]]:
    yield [name for name in shapes if ".layers." not in name]
    for i in range(layers):
        yield [name for name in shapes if f".layers.{i}." in name]


def _weights(name: str, shape: tuple[int, ...], changed: bool, device: str) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.full(shape, 1.01 if changed else 1.0, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    weight = 0.02 * torch.randn(shape, generator=generator, device=device)
    if changed:
        weight += 0.002 * torch.randn(shape, generator=generator, device=device)
    return weight.to(torch.bfloat16)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, as many tokens as a text has letters."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(i): i - 29 for i in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
