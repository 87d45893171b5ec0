"""The modules that own one expert's tensors for one layer. They are what PEFT saves, loads, moves and deletes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

import meswitch_kernels

from .. import ops
from ..compression.rows import coded_index
from ..delta_format.spec import LinearRecord, ModuleRecord, QuantizedRowsRecord, RowsRecord, ValuesRecord

__all__ = [
    "AnyRowsDelta",
    "LinearDelta",
    "QuantizedRowsDelta",
    "RowsDelta",
    "StoredDelta",
    "ValuesDelta",
    "make_delta",
]

#: Bytes of padded codes that are copied at a time.
_CHUNK = 2**21
#: Elements of a head's delta that are dense at once.
_BLOCK = 2**25
_DTYPES = {"U8": torch.uint8, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16}


class StoredDelta(nn.Module):
    """Leaves of one record as frozen parameters, in the dtypes of the delta format whatever the model is cast to."""

    def __init__(self, record: ModuleRecord, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.record = record
        for leaf, (stored, shape) in record.leaves().items():
            tensor = _room(leaf, shape, _DTYPES[stored] if stored else dtype, device)
            self.owner(leaf).register_parameter(leaf.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Its own tensors; ``parameters()`` takes as long to list them as a CPU takes for a small product."""
        return list(cast(dict[str, torch.Tensor], self._parameters).values())

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
        owner, name = self.owner(leaf), leaf.rpartition(".")[2]
        there = owner._parameters.get(name)
        if there is None or (there.dtype, there.shape, there.device) != (tensor.dtype, tensor.shape, device):
            there = nn.Parameter(_room(leaf, tensor.shape, tensor.dtype, device), requires_grad=False)
            setattr(owner, name, there)
        # Into the memory that was set aside: the largest leaves are tens of megabytes, and would be there twice.
        if there.is_contiguous():
            there.data.copy_(tensor)
            return
        # Torch copies to padded memory of another device through memory without padding, so some rows at a time.
        rows = max(1, _CHUNK // there.stride(0))
        for first in range(0, len(tensor), rows):
            there.data[first : first + rows].copy_(tensor[first : first + rows])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            # Rows of codes may be padded for the kernels, and files take whole tensors.
            for name in self._parameters:
                destination[prefix + name] = destination[prefix + name].contiguous()

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

    def merged_into(self, weight: torch.Tensor) -> torch.Tensor:
        """A new ``W + Δ̂`` like ``weight`` (``[out, in]``), added in float32 and rounded once."""
        return ops.merged_weight(self.record, self._leaves, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x Δ̂ᵀ``: ``[..., in]`` to ``[..., out]`` in the dtype of ``x``; the bias is the caller's business."""
        return ops.delta_linear(x, self.record, self._leaves)

    def coded_leaves(self) -> dict[str, torch.Tensor]:
        """The leaves that the delta's weight is made of, by name: all but the bias."""
        return {leaf: tensor.detach() for leaf, tensor in self._leaves.items() if leaf != "bias"}

    @property
    def _leaves(self) -> dict[str, torch.Tensor]:
        return cast(dict[str, torch.Tensor], self._parameters)


class RowsDelta(StoredDelta):
    """The expert's own rows: ``row_index`` int32 ``[rows]`` ascending, ``rows`` ``[rows, width]``."""

    record: RowsRecord
    row_index: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor

    @property
    def own_rows(self) -> torch.Tensor | None:
        """Rows that take nothing from the base's matrix, int32 ``[rows]``; `None` if there are none."""
        return self.row_index if self.record.rows else None

    def embed(
        self, ids: torch.Tensor, base: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Replace the embeddings of changed ids.

        Args:
            ids: int ``[...]``.
            base: the base's embeddings ``[..., width]``; anything where the id is new.
            weight: the base's matrix ``[base rows, width]``, not scaled.
            scale: factor that the base's module applies to its rows (Gemma), if it does.
        """
        if self.record.rows == 0:
            return base
        return _replace(base, ids, self.row_index, self.rows, scale)

    def logits(self, hidden: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Replace the logits of changed rows: ``hidden`` ``[..., width]``, ``base`` ``[..., at least num_rows]``."""
        if self.record.rows == 0:
            return base
        own = F.linear(hidden, self.rows.to(hidden.dtype)).to(base.dtype)
        return base.index_copy(-1, self.row_index.long(), own)

    def dense(self, base: torch.Tensor) -> torch.Tensor:
        """The expert's whole matrix ``[num_rows, width]`` in the dtype of ``base`` (``[base rows, width]``)."""
        full = _resized(base, self.record.num_rows)
        return full.index_copy_(0, self.row_index.long(), self.rows.to(base.dtype))


class QuantizedRowsDelta(StoredDelta):
    """Changed rows as quantised deltas against the base's rows, others as the expert's own.

    ``codes`` uint8 ``[coded, bytes]`` and ``step`` float32 ``[coded]`` are those of a linear with an output channel a
    row; ``row_index`` int32 ``[coded]``, ``exact_index`` int32 ``[exact]`` and ``rows`` ``[exact, width]`` are there
    where the record announces them.
    """

    record: QuantizedRowsRecord
    codes: torch.Tensor
    step: torch.Tensor
    row_index: torch.Tensor
    exact_index: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor

    @property
    def own_rows(self) -> torch.Tensor | None:
        """Rows that take nothing from the base's matrix, int32 ``[exact]``; `None` if there are none."""
        return self.exact_index if self.record.exact_rows else None

    def embed(
        self, ids: torch.Tensor, base: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """As :meth:`RowsDelta.embed`; only the deltas of the ids asked for are made dense."""
        if self.record.coded_rows:
            position, coded = self._positions(ids)
            known = ids.clamp_max(weight.shape[0] - 1)
            delta = self._dense_delta(position.reshape(-1), torch.float32).view(*ids.shape, self.record.width)
            rows = (F.embedding(known, weight).float() + delta).to(base.dtype)
            base = torch.where(coded.unsqueeze(-1), _scaled(rows, scale), base)
        if self.record.exact_rows:
            base = _replace(base, ids, self.exact_index, self.rows, scale)
        return base

    def logits(self, hidden: torch.Tensor, base: torch.Tensor, coded: torch.Tensor | None = None) -> torch.Tensor:
        """Correct the logits of coded rows and replace those of exact ones; shapes as of :meth:`RowsDelta.logits`.

        ``coded`` is :meth:`coded_delta`, for who has it already.
        """
        if coded is not None:
            part = F.linear(hidden, coded).to(base.dtype)
            if len(coded) == base.shape[-1]:
                base = base + part
            else:
                base = base.index_add(-1, coded_index(self.record, self._leaves), part)
        elif self.record.coded_rows:
            base = base.clone()
            for rows, index in self._blocks():
                part = F.linear(hidden, self._dense_delta(rows, hidden.dtype))
                base.index_add_(-1, index, part.to(base.dtype))
        if self.record.exact_rows:
            own = F.linear(hidden, self.rows.to(hidden.dtype)).to(base.dtype)
            base = base.index_copy(-1, self.exact_index.long(), own)
        return base

    def dense(self, base: torch.Tensor) -> torch.Tensor:
        """As :meth:`RowsDelta.dense`; coded rows are added in float32 and rounded once."""
        full = _resized(base, self.record.num_rows)
        for rows, index in self._blocks():
            added = full.index_select(0, index).float() + self._dense_delta(rows, torch.float32)
            full.index_copy_(0, index, added.to(base.dtype))
        if self.record.exact_rows:
            full.index_copy_(0, self.exact_index.long(), self.rows.to(base.dtype))
        return full

    def _positions(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each id is among the coded rows (anywhere if it is not), and whether it is; both as ``ids``."""
        record = self.record
        if record.has_row_index:
            return _look_up(ids, self.row_index)
        position, coded = ids, ids < record.num_rows
        if record.exact_rows:
            exact = _look_up(ids, self.exact_index)[1]
            position, coded = ids - torch.searchsorted(self.exact_index.to(ids.dtype), ids), coded & ~exact
        return position.clamp_max(record.coded_rows - 1), coded

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Coded rows a block at a time, as places among them and as int64 rows of the matrix.

        The delta of a large vocabulary takes gigabytes when it is dense.
        """
        index = coded_index(self.record, self._leaves)
        rows = max(1, _BLOCK // max(1, self.record.width))
        for start in range(0, self.record.coded_rows, rows):
            yield slice(start, start + rows), index[start : start + rows]

    def coded_leaves(self) -> dict[str, torch.Tensor]:
        """The leaves that coded rows are made of, by name."""
        names = ("codes", "step", "salient_index", "salient")
        return {leaf: tensor.detach() for leaf, tensor in self._leaves.items() if leaf in names}

    def coded_delta(self, dtype: torch.dtype) -> torch.Tensor:
        """The deltas of all coded rows, dense: ``[coded, width]`` of ``dtype``, as large as a model's head."""
        return torch.cat([self._dense_delta(rows, dtype) for rows, _ in self._blocks()])

    @property
    def _leaves(self) -> dict[str, torch.Tensor]:
        return cast(dict[str, torch.Tensor], self._parameters)

    def _dense_delta(self, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Deltas of coded rows, by their place among them: ``[rows, width]`` of ``dtype``."""
        leaves = {"codes": self.codes[rows], "step": self.step[rows]}
        if self.record.salient_channels:
            leaves |= {"salient_index": cast(torch.Tensor, self._parameters["salient_index"])}
            leaves |= {"salient": cast(torch.Tensor, self._parameters["salient"])[rows]}
        return ops.dequantize_delta(self.record.as_linear(len(leaves["step"])), leaves, dtype)


#: Deltas of an embedding or output head.
AnyRowsDelta = RowsDelta | QuantizedRowsDelta


def _look_up(ids: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of each id in an ascending, not empty index (anywhere if it is not in it), and whether it is there."""
    index = index.to(ids.dtype)
    place = torch.searchsorted(index, ids).clamp_max_(len(index) - 1)
    return place, index[place] == ids


def _scaled(rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return rows if scale is None else rows * scale.to(rows)


def _replace(
    base: torch.Tensor, ids: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """Embeddings ``[..., width]`` with those of the ids in ``index`` replaced by the rows that belong to them."""
    place, found = _look_up(ids, index)
    return torch.where(found.unsqueeze(-1), _scaled(rows[place].to(base.dtype), scale), base)


def _resized(base: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A copy of a matrix with ``num_rows`` rows: cut, or filled up with zeros."""
    kept = min(base.shape[0], num_rows)
    full = base.new_zeros(num_rows, base.shape[1])
    full[:kept] = base[:kept]
    return full


class ValuesDelta(StoredDelta):
    """The expert's own parameters of a small module, under ``values``."""

    record: ValuesRecord
    values: nn.Module


def _room(leaf: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for a leaf, to be filled; of codes as the kernels read them, where they run."""
    if leaf == "codes" and ops.runs_kernels(device):
        return meswitch_kernels.blank_codes(shape, device)
    return torch.empty(*shape, dtype=dtype, device=device)


def make_delta(record: ModuleRecord, dtype: torch.dtype, device: torch.device) -> StoredDelta:
    """An empty delta module for a record; ``dtype`` is that of leaves stored in the expert's own dtype."""
    kinds: dict[type, type[StoredDelta]] = {
        LinearRecord: LinearDelta,
        RowsRecord: RowsDelta,
        QuantizedRowsRecord: QuantizedRowsDelta,
        ValuesRecord: ValuesDelta,
    }
    return kinds[type(record)](record, dtype, device)
