"""The bytes of a delta on disk, predicted from a model without weights.

Kinds of modules, tensor shapes and the configuration come from the package's own code; only the layout of a
safetensors header is written down again here, since the library makes one from real tensors only.
``tests/test_size_benchmark.py`` holds the prediction against files really written.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from transformers_meswitch.compression.expert_config import expert_config
from transformers_meswitch.compression.rows import rows_record
from transformers_meswitch.configuration import MESwitchConfig, MESwitchExpertConfig
from transformers_meswitch.delta_format.fingerprint import ALGORITHM
from transformers_meswitch.delta_format.spec import (
    LinearRecord,
    ModuleRecord,
    ValuesRecord,
    tensor_key,
)
from transformers_meswitch.delta_format.writer import _json
from transformers_meswitch.module_kinds import linear_sizes, module_kinds

ITEM_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "I32": 4, "F32": 4}
#: safetensors lays tensors out by dtype, widest first in its own order of dtypes, then by name.
_DTYPE_ORDER = ("F32", "I32", "BF16", "F16", "U8")


@dataclass(frozen=True)
class Prediction:
    """Bytes of one delta repo's files; tokenizer and card, which a full copy has too, are left out on both sides."""

    weights: int
    config: int

    @property
    def total(self) -> int:
        return self.weights + self.config


def records_of(
    model: PreTrainedModel, config: MESwitchConfig, *, rows: bool = True, own_dtype: str = "BF16"
) -> dict[str, ModuleRecord]:
    """The records of an expert all of whose parameters differ from the base's.

    Args:
        model: the expert's model; ``meta`` will do.
        config: bits and salient channels.
        rows: whether embedding and output head differ too, in every row.
        own_dtype: safetensors name of the expert's dtype.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    records: dict[str, ModuleRecord] = {}
    for name, kind in module_kinds(model).items():
        module = model.get_submodule(name)
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        if kind == "linear":
            out_features, in_features = linear_sizes(module)
            salient = min(config.salient_channels, in_features)
            bias = "bias" in shapes
            bits = config.bits_of(name)
            records[name] = LinearRecord(out_features, in_features, bits, salient, config.column_steps, bias)
        elif kind == "values":
            records[name] = ValuesRecord(shapes)
        elif rows and not (module is head and module.weight is embedding):
            num_rows, width = shapes["weight"]
            records[name] = rows_record(
                num_rows,
                width,
                changed=num_rows,
                added=0,
                bits=config.row_bits_of(name),
                salient_channels=config.salient_channels,
                own_bytes=ITEM_BYTES[own_dtype],
                bias="bias" in shapes,
            )
    return records


def weights_bytes(records: dict[str, ModuleRecord], own_dtype: str = "BF16") -> int:
    """Size of ``adapter_model.safetensors``: 8 bytes of length, the padded JSON header, the data.

    Args:
        records: module name to record.
        own_dtype: safetensors name of the expert's dtype.
    """
    tensors = [
        (_DTYPE_ORDER.index(dtype or own_dtype), tensor_key(module, leaf), dtype or own_dtype, shape)
        for module, record in records.items()
        for leaf, (dtype, shape) in record.leaves().items()
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for _, key, dtype, shape in sorted(tensors):
        end = position + ITEM_BYTES[dtype] * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + position


def config_bytes(config: MESwitchExpertConfig) -> int:
    """Size of ``adapter_config.json``."""
    return len(_json(config.to_dict()))


def predict(model: PreTrainedModel, base: str, config: MESwitchConfig, *, rows: bool = True) -> Prediction:
    """Bytes of the calibrated delta of a bfloat16 fine-tune of a base on the Hub.

    Args:
        model: the expert's model; ``meta`` will do.
        base: Hub id of the base.
        config: bits and salient channels.
        rows: whether embedding and output head differ too, in every row.
    """
    records = records_of(model, config, rows=rows)
    last_token = model.config.vocab_size - 1
    delta = expert_config(
        config,
        records,
        base=base,
        base_revision="0" * 40,
        base_fingerprint={
            "algorithm": ALGORITHM,
            "digest": "0" * 64,
            "tensors": dict.fromkeys(dict(model.named_parameters()), "0" * 16),
        },
        expert=f"{base}-Instruct",
        model_config=model.config,
        generation_config=GenerationConfig(eos_token_id=last_token, pad_token_id=last_token),
        vocab_size=model.config.vocab_size,
        tied=model.config.tie_word_embeddings,
        calibrated=True,
    )
    return Prediction(weights_bytes(records), config_bytes(delta))
