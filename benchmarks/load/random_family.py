"""A base and delta repos of a given shape with random weights: for time and memory, never for accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from transformers_meswitch.compression.expert_config import expert_config
from transformers_meswitch.compression.sources import meta_model
from transformers_meswitch.configuration import MESwitchConfig, MESwitchExpertConfig
from transformers_meswitch.delta_format.checkpoint import resolve_checkpoint
from transformers_meswitch.delta_format.fingerprint import fingerprint_checkpoint
from transformers_meswitch.delta_format.spec import (
    LinearRecord,
    ModuleRecord,
    QuantizedRowsRecord,
    ValuesRecord,
    tensor_key,
)
from transformers_meswitch.delta_format.writer import write_delta
from transformers_meswitch.module_kinds import linear_sizes, module_kinds

__all__ = ["SHAPES", "random_expert", "write_base", "write_delta_repo"]

SHAPES: dict[str, PreTrainedConfig] = {
    # 32 layers, as deep as a 7B, but narrow: what a switch costs depends on the number of layers only.
    "deep": LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=32, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    ),
    # The smallest model that people run on a CPU; its head apart from its embedding, as random experts have it.
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=False,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None,
    ),
}  # fmt: skip


def write_base(folder: Path, config: PreTrainedConfig, device: str) -> None:
    """Write a checkpoint of random bfloat16 weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="5GB")


def random_expert(
    config: PreTrainedConfig,
    request: MESwitchConfig,
    seed: int,
    *,
    base: Path | None = None,
    rows_bits: int | None = None,
    device: str = "cpu",
) -> tuple[MESwitchExpertConfig, dict[str, torch.Tensor]]:
    """A delta whose linears and norms are random: its config, and its tensors keyed as on disk.

    Args:
        config: of the base.
        request: bits and salient channels.
        seed: of the numbers.
        base: the base's checkpoint, if it has one.
        rows_bits: bits of the embedding's and the head's rows, all of which differ; they are the base's if `None`.
        device: where the tensors are made.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model = meta_model(config)
    records: dict[str, ModuleRecord] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, kind in module_kinds(model).items():
        module = model.get_submodule(name)
        record: ModuleRecord
        if kind == "linear":
            out, width = linear_sizes(module)
            record = LinearRecord(out, width, request.bits_of(name), min(request.salient_channels, width))
        elif kind == "values":
            record = ValuesRecord({key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)})
        elif rows_bits is not None:
            rows, width = module.weight.shape  # type: ignore[union-attr, misc]
            record = QuantizedRowsRecord(rows, width, rows_bits, rows)  # type: ignore[arg-type]
        else:
            continue
        records[name] = record
        for leaf, (dtype, shape) in record.leaves().items():
            tensors[tensor_key(name, leaf)] = _random(leaf, dtype, shape, record, generator)
    delta = expert_config(
        request,
        records,
        base="random" if base is None else base,
        base_revision=None,
        base_fingerprint=None if base is None else fingerprint_checkpoint(resolve_checkpoint(base).paths),
        expert="random",
        model_config=config,
        generation_config=model.generation_config,
        vocab_size=config.vocab_size,
        tied=False,
        calibrated=False,
    )
    return delta, tensors


def write_delta_repo(folder: Path, base: Path, config: PreTrainedConfig, request: MESwitchConfig, seed: int) -> None:
    """Write a delta repo whose linears and norms are random; the embedding and head are the base's."""
    write_delta(folder, *random_expert(config, request, seed, base=base))


def _random(
    leaf: str, dtype: str | None, shape: tuple[int, ...], record: ModuleRecord, generator: torch.Generator
) -> torch.Tensor:
    device = generator.device
    if leaf == "codes":
        assert isinstance(record, LinearRecord | QuantizedRowsRecord)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
        spare = -record.coded_channels * record.bits % 8
        codes[:, -1] &= 0xFF >> spare
        return codes
    if leaf == "salient_index":
        assert isinstance(record, LinearRecord)
        index = torch.randperm(record.in_features, generator=generator, device=device)
        return index[: shape[0]].sort().values.int()
    values: Any = torch.rand(shape, generator=generator, device=device)
    if leaf == "step":
        return values * 1e-3
    return (values if leaf.startswith("values") else (values - 0.5) * 1e-2).to(torch.bfloat16)
