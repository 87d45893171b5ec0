"""The modules that own one expert's tensors for one layer. They are what PEFT saves, loads, moves and deletes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..delta_format.spec import LinearRecord, ModuleRecord, RowsRecord, ValuesRecord

__all__ = ["LinearDelta", "RowsDelta", "StoredDelta", "ValuesDelta", "make_delta"]

_DTYPES = {"U8": torch.uint8, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16}


class StoredDelta(nn.Module):
    """Leaves of one record as frozen parameters, in the dtypes of the delta format whatever the model is cast to."""

    def __init__(self, record: ModuleRecord, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.record = record
        for leaf, (stored, shape) in record.leaves().items():
            tensor = torch.empty(shape, dtype=_DTYPES[stored] if stored else dtype, device=device)
            self.owner(leaf).register_parameter(leaf.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))

    def owner(self, leaf: str) -> nn.Module:
        """The module that holds a leaf: this one, or the container of ``values.*``."""
        prefix, dot, _ = leaf.rpartition(".")
        if not dot:
            return self
        if prefix not in self._modules:
            self.add_module(prefix, nn.Module())
        return self.get_submodule(prefix)

    def assign(self, leaf: str, tensor: torch.Tensor, device: torch.device) -> None:
        """Fill one leaf with a checked tensor, kept in its own dtype; copied, since it may be mapped from a file."""
        setattr(
            self.owner(leaf), leaf.rpartition(".")[2], nn.Parameter(tensor.to(device, copy=True), requires_grad=False)
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> StoredDelta:
        # model.half() and model.to(dtype) must not round step sizes: follow the device, keep the dtype.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, *args, **kwargs)
        return self


class LinearDelta(StoredDelta):
    """A quantised weight delta: ``codes`` uint8 ``[out, bytes]``, ``step`` float32 ``[out]``, and options."""

    record: LinearRecord
    codes: torch.Tensor
    step: torch.Tensor
    bias: torch.Tensor

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The delta as a dense weight ``[out, in]`` in ``dtype``."""
        return ops.dequantize_delta(self.record, self._leaves, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x Δ̂ᵀ``: ``[..., in]`` to ``[..., out]`` in the dtype of ``x``; the bias is the caller's business."""
        return ops.delta_linear(x, self.record, self._leaves)

    @property
    def _leaves(self) -> dict[str, torch.Tensor]:
        return cast(dict[str, torch.Tensor], self._parameters)


class RowsDelta(StoredDelta):
    """The expert's own rows: ``row_index`` int32 ``[rows]`` ascending, ``rows`` ``[rows, width]``."""

    record: RowsRecord
    row_index: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor

    def embed(self, ids: torch.Tensor, base: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Replace the embeddings of changed ids.

        Args:
            ids: int ``[...]``.
            base: the base's embeddings ``[..., width]``; anything where the id is new.
            scale: factor that the base's module applies to its rows (Gemma), if it does.
        """
        if self.record.rows == 0:
            return base
        index = self.row_index.to(ids.dtype)
        position = torch.searchsorted(index, ids).clamp_max_(self.record.rows - 1)
        changed = index[position] == ids
        rows = self.rows[position].to(base.dtype)
        if scale is not None:
            rows = rows * scale.to(rows)
        return torch.where(changed.unsqueeze(-1), rows, base)

    def logits(self, hidden: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Replace the logits of changed rows: ``hidden`` ``[..., width]``, ``base`` ``[..., at least num_rows]``."""
        if self.record.rows == 0:
            return base
        own = F.linear(hidden, self.rows.to(hidden.dtype)).to(base.dtype)
        return base.index_copy(-1, self.row_index.long(), own)

    def dense(self, base: torch.Tensor) -> torch.Tensor:
        """The expert's whole matrix ``[num_rows, width]`` in the dtype of ``base`` (``[base rows, width]``)."""
        kept = min(base.shape[0], self.record.num_rows)
        full = base.new_zeros(self.record.num_rows, self.record.width)
        full[:kept] = base[:kept]
        return full.index_copy_(0, self.row_index.long(), self.rows.to(base.dtype))


class ValuesDelta(StoredDelta):
    """The expert's own parameters of a small module, under ``values``."""

    record: ValuesRecord
    values: nn.Module


def make_delta(record: ModuleRecord, dtype: torch.dtype, device: torch.device) -> StoredDelta:
    """An empty delta module for a record; ``dtype`` is that of leaves stored in the expert's own dtype."""
    kinds = {LinearRecord: LinearDelta, RowsRecord: RowsDelta, ValuesRecord: ValuesDelta}
    return kinds[type(record)](record, dtype, device)
