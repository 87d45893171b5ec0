"""The parameters of a model that is being compressed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from ..delta_format.spec import ModuleRecord, tensor_key
from .delta_parameters import DeltaParameters
from .sources import Parameters

__all__ = ["PartlyCompressed"]


class PartlyCompressed:
    """Base + delta of what is compressed, the expert's of what is not yet; see :class:`~.sources.Parameters`.

    Args:
        model: the expert's causal LM, on any device, ``meta`` included; only its structure is used.
        base: the base's parameters.
        expert: the expert's.
        finished: names of modules that an earlier run compressed.
        read: the record and the leaves of one of these.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Parameters,
        expert: Parameters,
        finished: Collection[str] = (),
        read: Callable[[str], tuple[ModuleRecord, Mapping[str, Tensor]]] | None = None,
    ) -> None:
        self._expert, self._finished, self._read = expert, frozenset(finished), read
        self._records: dict[str, ModuleRecord] = {}
        self._tensors: dict[str, Tensor] = {}
        self._delta = DeltaParameters(model, base, expert, self._records, self._tensors)
        self.tied, self.modules = expert.tied, expert.modules

    def settle(self, name: str, record: ModuleRecord, leaves: Mapping[str, Tensor]) -> None:
        """From now on a module is what its delta makes of the base's.

        Args:
            name: canonical module name.
            record: its record.
            leaves: its tensors by leaf name, which stay in memory.
        """
        self._records[name] = record
        self._tensors.update({tensor_key(name, leaf): tensor for leaf, tensor in leaves.items()})

    def release(self) -> None:
        """Forget what was settled, which nobody will ask for again."""
        self._records.clear()
        self._tensors.clear()

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters by name."""
        return self._expert.shapes(module)

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own parameters by name."""
        if module not in self._records and module in self._finished and self._read is not None:
            self.settle(module, *self._read(module))
        return (self._delta if module in self._records else self._expert).of(module)

    def announce(self, module: str) -> None:
        """Have the system fetch a module's parameters from the disk meanwhile."""
        self._expert.announce(module)
        self._delta.announce(module)
