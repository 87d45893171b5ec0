"""The package's own compression, through what it exports to its producers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_meswitch import MESwitchConfig
from transformers_meswitch.compression.driver import compress_modules
from transformers_meswitch.compression.linear import compress_linear, reconstruct_linear
from transformers_meswitch.delta_format.spec import LinearRecord, ModuleRecord, RowsRecord, ValuesRecord
from transformers_meswitch.errors import CompressionError

from .base import Compressed, Inputs, State

__all__ = ["accepts_full_moments", "linear_budget", "ours"]


@functools.cache
def accepts_full_moments() -> bool:
    """Whether ``compress_linear`` takes the whole second moment matrix of a layer's inputs, or its diagonal only."""
    try:
        compress_linear(torch.ones(2, 3), bits=2, salient_channels=0, second_moment=torch.eye(3))
    except CompressionError:
        return False
    return True


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


def leaf_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of a module's tensors, which are stored as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def ours(inputs: Inputs, config: MESwitchConfig) -> Compressed:
    """The delta that ``meswitch compress`` makes of the expert, calibrated.

    Args:
        inputs: the expert.
        config: bits, salient channels and column steps.
    """
    moments = dict(inputs.moments)
    if not accepts_full_moments():
        moments = {name: moment.diagonal().contiguous() for name, moment in moments.items()}
    result = Compressed({}, 0, rest_bytes=0)
    modules = compress_modules(
        inputs.model,
        StateParameters(inputs.model, inputs.base),
        StateParameters(inputs.model, inputs.expert),
        config,
        second_moments=moments,
        progress=False,
    )
    changed = set()
    for name, record, tensors in modules:
        changed.add(name)
        if isinstance(record, LinearRecord):
            result.deltas[name] = reconstruct_linear(record, tensors)
            result.linear_bytes += leaf_bytes(tensors)
        else:
            result.rest.update(_rest(name, record, tensors, inputs.base))
            result.rest_bytes = (result.rest_bytes or 0) + leaf_bytes(tensors)
    for name in inputs.linears():
        if name not in changed:
            result.deltas[name] = torch.zeros_like(inputs.delta(name))
    return result


def _rest(name: str, record: ModuleRecord, tensors: dict[str, Tensor], base: State) -> dict[str, Tensor]:
    """Parameters of a module that is no linear, by full name.

    Raises:
        NotImplementedError: a kind of module that the delta format did not have when this was written.
    """
    if isinstance(record, ValuesRecord):
        return {f"{name}.{key}": tensors[f"values.{key}"] for key in record.shapes}
    if isinstance(record, RowsRecord):
        weight = base[f"{name}.weight"][: record.num_rows].clone()
        weight[tensors["row_index"].long()] = tensors["rows"]
        return {f"{name}.weight": weight}
    raise NotImplementedError(f"{name} is stored as {type(record).__name__}; teach benchmarks/quality to read it")


def linear_budget(inputs: Inputs, bits: int, channels: int) -> dict[str, int]:
    """Bytes of each linear at ``bits`` with a step a row and ``channels`` salient ones, for methods of equal bytes."""
    found = {}
    for name in inputs.linears():
        out, width = inputs.base[f"{name}.weight"].shape
        found[name] = out * -(-(width - channels) * bits // 8) + 4 * out + channels * (4 + 2 * out)
    return found
