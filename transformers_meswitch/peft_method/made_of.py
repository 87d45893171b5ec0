"""Whether what was worked out of tensors and kept is still of the tensors that are there."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["MadeOf"]


class MadeOf(NamedTuple):
    """Tensors, and their versions when something was made of them.

    They are held as long as what was made of them, so that no other can have taken their place in memory. Changes
    through ``.data`` are recorded nowhere and not noticed.

    >>> tensor = torch.zeros(2)
    >>> made_of = MadeOf.now([tensor])
    >>> made_of.still([tensor])
    True
    >>> tensor.add_(1)
    tensor([1., 1.])
    >>> made_of.still([tensor]), made_of.still([tensor.clone()])
    (False, False)
    """

    tensors: Sequence[torch.Tensor]
    versions: list[int]

    @classmethod
    def now(cls, tensors: Sequence[torch.Tensor]) -> MadeOf | None:
        """The tensors as they are; `None` where one was made in inference mode, which does not say when it changes."""
        if any(tensor.is_inference() for tensor in tensors):
            return None
        return cls(tensors, [tensor._version for tensor in tensors])

    def still(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors in the same state."""
        return (
            len(self.tensors) == len(tensors)
            and all(map(operator.is_, self.tensors, tensors))
            and self.versions == [tensor._version for tensor in tensors]
        )
