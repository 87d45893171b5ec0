"""The package's own compression, through what it exports to its producers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_meswitch import MESwitchConfig
from transformers_meswitch.compression.batches import CalibrationBatches, pack
from transformers_meswitch.compression.driver import compress_modules
from transformers_meswitch.compression.linear import reconstruct_linear
from transformers_meswitch.compression.partly_compressed import PartlyCompressed
from transformers_meswitch.compression.rows import coded_index
from transformers_meswitch.compression.sequential import SequentialStatistics
from transformers_meswitch.delta_format.spec import (
    LinearRecord,
    ModuleRecord,
    QuantizedRowsRecord,
    RowsRecord,
    ValuesRecord,
)

from .base import Compressed, Inputs, State

__all__ = ["collected", "leaf_bytes", "linear_budget", "ours"]


class StateParameters:
    """Parameters of a state dict, as the package's producers read them; see ``compression.sources.Parameters``.

    Args:
        model: of the architecture.
        state: parameter's full name to its value.
    """

    def __init__(self, model: PreTrainedModel, state: State) -> None:
        self._state = state
        self._owned: dict[str, dict[str, str]] = {}
        for name, module in model.named_modules():
            names = {key: f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
            if names:
                self._owned[name] = names
        self.tied = bool(model.config.tie_word_embeddings)
        self.modules = tuple(self._owned)

    def _value(self, full: str) -> Tensor:
        return self._state["model.embed_tokens.weight" if full == "lm_head.weight" and self.tied else full]

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters by name."""
        return {key: tuple(self._value(full).shape) for key, full in self._owned[module].items()}

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own parameters by name."""
        return {key: self._value(full) for key, full in self._owned[module].items()}

    def announce(self, module: str) -> None:
        """Nothing to fetch: all is in memory."""


def leaf_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of a module's tensors, which are stored as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def ours(
    inputs: Inputs, config: MESwitchConfig, *, fit: Literal["in turn", "alone", "diagonal"] = "in turn"
) -> Compressed:
    """The delta that ``meswitch compress`` makes of the expert, calibrated.

    Args:
        inputs: the expert.
        config: bits, salient channels and column steps.
        fit: to what each linear is fitted: to its inputs in the model that is being made, as the package does; to tell
            what that is worth, to those in the expert; and of these to the second moments' diagonal alone.
    """
    base, expert = (StateParameters(inputs.model, state) for state in (inputs.base, inputs.expert))
    sources: dict[str, Any]
    if fit == "in turn":
        sequences = [ids for ids, _ in inputs.sequences]
        batches = tuple(pack(sequences, max_length=max(map(len, sequences))))
        statistics = SequentialStatistics(
            inputs.model.config,
            expert,
            PartlyCompressed(inputs.model, base, expert),
            CalibrationBatches(batches, len(sequences), sum(map(len, sequences))),
            device=next(iter(inputs.base.values())).device,
            dtype=inputs.model.dtype,
            progress=False,
        )
        sources = {"second_moments": statistics, "drifts": statistics}
    else:
        of_all = inputs.moments.items()
        sources = {"second_moments": {name: c.diagonal() if fit == "diagonal" else c for name, c in of_all}}
    return collected(inputs, compress_modules(inputs.model, base, expert, config, progress=False, **sources))


def collected(inputs: Inputs, modules: Iterable[tuple[str, ModuleRecord, dict[str, Tensor]]]) -> Compressed:
    """What the modules of a delta stand for, and their bytes.

    Args:
        inputs: the expert.
        modules: name, record and tensors by leaf of each.
    """
    result = Compressed({}, 0, rest_bytes=0)
    for name, record, tensors in modules:
        if isinstance(record, LinearRecord):
            result.deltas[name] = reconstruct_linear(record, tensors)
            result.linear_bytes += leaf_bytes(tensors)
        else:
            result.rest.update(_rest(name, record, tensors, inputs.base))
            result.rest_bytes = (result.rest_bytes or 0) + leaf_bytes(tensors)
    for name in inputs.linears():
        if name not in result.deltas:
            result.deltas[name] = torch.zeros_like(inputs.delta(name))
    return result


def _rest(name: str, record: ModuleRecord, tensors: dict[str, Tensor], base: State) -> dict[str, Tensor]:
    """Parameters of a module that is no linear, by full name."""
    if isinstance(record, ValuesRecord):
        return {f"{name}.{key}": tensors[f"values.{key}"] for key in record.shapes}
    assert isinstance(record, RowsRecord | QuantizedRowsRecord)
    weight = base[f"{name}.weight"][: record.num_rows].clone()
    if isinstance(record, RowsRecord):
        weight[tensors["row_index"].long()] = tensors["rows"]
        return {f"{name}.weight": weight}
    coded = coded_index(record, tensors)
    delta = reconstruct_linear(record.as_linear(record.coded_rows), tensors)
    weight[coded] = (weight[coded].float() + delta).to(weight.dtype)
    if record.exact_rows:
        weight[tensors["exact_index"].long()] = tensors["rows"]
    return {f"{name}.weight": weight}


def linear_budget(inputs: Inputs, bits: int, channels: int) -> dict[str, int]:
    """Bytes of each linear at ``bits`` with a step a row and ``channels`` salient ones, for methods of equal bytes."""
    found = {}
    for name in inputs.linears():
        out, width = inputs.base[f"{name}.weight"].shape
        found[name] = out * -(-(width - channels) * bits // 8) + 4 * out + channels * (4 + 2 * out)
    return found
