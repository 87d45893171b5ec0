"""The parameters that a delta makes of its base, one module at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..delta_format.spec import LinearRecord, ModuleRecord, QuantizedRowsRecord, RowsRecord, tensor_key
from ..delta_format.tensor_files import TensorFiles
from ..module_kinds import is_conv1d
from .linear import reconstruct_linear
from .rows import coded_index
from .sources import Parameters, input_embedding, output_head

__all__ = ["DeltaParameters"]


class DeltaParameters:
    """Parameters of base + delta; see :class:`~.sources.Parameters`.

    Args:
        model: the expert's causal LM, on any device, ``meta`` included; only its structure is used.
        base: the base's parameters.
        expert: the expert's, for shapes and tying.
        records: canonical module name to record.
        tensors: name on disk to tensor.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Parameters,
        expert: Parameters,
        records: Mapping[str, ModuleRecord],
        tensors: TensorFiles | Mapping[str, Tensor],
    ) -> None:
        self._model, self._base, self._expert = model, base, expert
        self._records, self._tensors = records, tensors
        self.tied, self.modules = expert.tied, expert.modules
        #: A head that is tied in both has no record of its own.
        self._stored_as = {output_head(model): input_embedding(model)} if base.tied and expert.tied else {}

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters by name."""
        return self._expert.shapes(module)

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own parameters by name: float32 where it is quantised, where its tensors are; else as stored."""
        parameters = dict(self._base.of(module))
        stored = self._stored_as.get(module, module)
        record = self._records.get(stored)
        if record is None:
            return parameters
        leaves = {leaf: self._leaf(tensor_key(stored, leaf)) for leaf in record.leaves()}
        if isinstance(record, LinearRecord):
            change = reconstruct_linear(record, leaves)
            change = change.T if is_conv1d(self._submodule(module)) else change
            parameters["weight"] = parameters["weight"].to(change.device, torch.float32) + change
        elif isinstance(record, RowsRecord | QuantizedRowsRecord):
            parameters["weight"] = _rows(parameters["weight"], record, leaves)
        else:
            parameters |= {name.removeprefix("values."): value for name, value in leaves.items()}
        if "bias" in leaves:
            parameters["bias"] = leaves["bias"]
        return parameters

    def announce(self, module: str) -> None:
        """Have the system fetch the base's parameters from the disk meanwhile."""
        self._base.announce(module)

    def _submodule(self, name: str) -> nn.Module:
        return self._model.get_submodule(name)

    def _leaf(self, key: str) -> Tensor:
        return self._tensors.read(key) if isinstance(self._tensors, TensorFiles) else self._tensors[key]


def _rows(base: Tensor, record: RowsRecord | QuantizedRowsRecord, leaves: Mapping[str, Tensor]) -> Tensor:
    """The expert's matrix, float32 ``[num_rows, width]``."""
    shared = min(record.num_rows, len(base))
    weight = torch.zeros(record.num_rows, record.width, device=next(iter(leaves.values())).device)
    weight[:shared] = base[:shared]
    if isinstance(record, RowsRecord):
        return weight.index_copy_(0, leaves["row_index"].long(), leaves["rows"].float())
    index = coded_index(record, leaves)
    weight[index] += reconstruct_linear(record.as_linear(record.coded_rows), leaves)
    if record.exact_rows:
        weight.index_copy_(0, leaves["exact_index"].long(), leaves["rows"].float())
    return weight
