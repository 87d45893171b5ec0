"""An embedding or output head through the kernels: its table of experts' rows, kept in step with their owners."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from meswitch_kernels import DeltaLeaves, RowGroups, RowsLeaves, RowsTable, head_rows, map_rows
from meswitch_kernels.rows_leaves import OWN_DTYPES

from ..compression.rows import coded_index
from .deltas import AnyRowsDelta, QuantizedRowsDelta
from .kernel_path import DTYPES, align_codes, are_for_kernels
from .slots import ROOM

__all__ = ["RowsPath", "correct_logits", "rows_leaves"]


def rows_leaves(delta: AnyRowsDelta, known: int, dtype: torch.dtype) -> RowsLeaves:
    """A delta's rows as the kernels take them: the parameters themselves, and a map of 4 bytes an id.

    Codes whose rows the kernels could not read are replaced by the same values in padded memory.

    Args:
        delta: of an embedding or head.
        known: ids of the expert's vocabulary.
        dtype: the base's, to which own rows of a dtype that the kernels lack are rounded, as when they are merged.
    """
    own_index = delta.own_rows
    own = None if own_index is None else delta.rows.detach()
    if own is not None and own.dtype not in OWN_DTYPES:
        own = own.to(dtype if dtype in OWN_DTYPES else torch.float32)
    coded, coded_ids = None, None
    if isinstance(delta, QuantizedRowsDelta) and delta.record.coded_rows:
        align_codes(delta)
        leaves = {name: leaf.detach() for name, leaf in delta.named_parameters(recurse=False)}
        coded_ids = coded_index(delta.record, leaves)
        coded = DeltaLeaves(
            leaves["codes"],
            leaves["step"],
            delta.record.bits,
            salient_index=leaves.get("salient_index"),
            salient=leaves.get("salient"),
        )
    device = next(delta.parameters()).device
    return RowsLeaves(map_rows(known, coded_ids, own_index, device), coded=coded, own=own)


class RowsPath:
    """Where the kernels find the experts' rows of one embedding or head.

    The tensors stay the parameters of the delta modules. Whoever gives those other tensors, or moves them, calls
    :meth:`place`.

    Args:
        width: columns of the embedding or head.

    Attributes:
        leaves: by expert, what was placed.
        known: ids of the largest vocabulary that was ever placed.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._table: RowsTable | None = None
        self._slots: dict[str, int] = {}
        self._absent: set[str] = set()
        self.leaves: dict[str, RowsLeaves] = {}
        self.known = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin empty: the table holds addresses of this layer's tensors."""
        return {**self.__dict__, "_table": None, "_slots": {}, "_absent": set(), "leaves": {}}

    def place(self, expert: str, slot: int, leaves: RowsLeaves | None, device: torch.device) -> None:
        """Show the kernels an expert's rows.

        Args:
            expert: its name.
            slot: its number.
            leaves: its rows; `None` where the kernels cannot have them, and then they answer for no expert.
            device: of the layer, one that has kernels.
        """
        if self._table is None or self._table.rows.device != device:
            # The layer was moved, and all of its experts will be placed anew.
            self._slots, self.leaves = {}, {}
            self._table = RowsTable(ROOM, self._width, device)
        # What is compiled or captured does not know of a larger table; so many experts are rare.
        while slot >= self._table.slots:
            self._table = self._table.resized(2 * self._table.slots)
        if leaves is None or leaves.row_map.device != device:
            self.clear(expert)
            self._absent.add(expert)
            return
        self._table.set(slot, leaves)
        self._slots[expert] = slot
        self._absent.discard(expert)
        self.leaves[expert] = leaves
        self.known = max(self.known, leaves.row_map.shape[0])

    def drop(self) -> None:
        """Forget all experts, on a device without kernels."""
        self._table, self._slots, self._absent, self.leaves = None, {}, set(), {}

    def clear(self, expert: str) -> None:
        """Forget an expert, if it was placed."""
        slot = self._slots.pop(expert, None)
        self._absent.discard(expert)
        self.leaves.pop(expert, None)
        if slot is not None and self._table is not None:
            self._table.clear(slot)

    @property
    def tables(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The table's two parts, int64 on the layer's device; `None` where there are no kernels."""
        return (None, None) if self._table is None else (self._table.coded, self._table.rows)

    def embeds(self, ids: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether the kernels answer these ids: without gradients, of a dtype and device of theirs."""
        return (
            self._table is not None
            and not self._absent
            and ids.device == weight.device == self._table.rows.device
            and weight.dtype in DTYPES
            and not (torch.is_grad_enabled() and weight.requires_grad)
        )

    def takes(self, x: torch.Tensor, base: nn.Module) -> bool:
        """Whether the kernels are for this input of a head; as :meth:`~.kernel_path.KernelPath.takes`."""
        return self._table is not None and not self._absent and are_for_kernels(x, self._table.rows.device, base)


def correct_logits(
    hidden: torch.Tensor,
    base: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    groups: RowGroups,
    capacity: int,
) -> torch.Tensor:
    """:func:`~meswitch_kernels.head_rows` for inputs of any number of dimensions.

    Args:
        hidden: ``[..., width]``.
        base: ``[..., base rows]``, the base's logits.
        tables: of the head.
        groups: the rows by expert.
        capacity: ids of the result.

    Returns:
        ``[..., capacity]``.
    """
    flat = head_rows(
        hidden.reshape(-1, hidden.shape[-1]), base.reshape(-1, base.shape[-1]), *tables, groups, capacity=capacity
    )
    return flat.view(*hidden.shape[:-1], capacity)
