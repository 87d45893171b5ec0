"""The device table through which the kernels find the experts' rows of an embedding or output head."""

from __future__ import annotations

import torch

from .delta_leaves import DeltaLeaves
from .expert_table import COLUMNS
from .rows_leaves import OWN_DTYPES, RowsLeaves, check_rows_leaves

__all__ = ["ROWS_COLUMNS", "RowsTable"]

#: Columns that a row has beside those of :data:`~meswitch_kernels.expert_table.COLUMNS`. The first three are
#: addresses, 0 for a tensor that the expert lacks. ``known`` is the number of ids in its map, 0 in an empty slot;
#: ``own_dtype`` is the place of its own rows' dtype in :data:`~meswitch_kernels.rows_leaves.OWN_DTYPES`, from 1.
ROWS_COLUMNS = ("row_map", "own", "bias", "known", "own_dtype")


class RowsTable:
    """Addresses of the experts' rows of one embedding or head: an :class:`~meswitch_kernels.ExpertTable` of rows.

    As there: it is read when kernels run and written in place, the tensors stay the owner's, and the table holds an
    alias of each until its slot is set again or cleared. Experts of unlike vocabularies share one table.

    Args:
        slots: how many experts fit.
        width: columns of the embedding or head.
        device: where it is.

    Attributes:
        coded: int64 ``[slots, len(COLUMNS)]`` on the device: where coded rows are. The kernels of linears read it as
            the table of a layer whose output channels are coded rows, of which each expert has as many as it has.
        rows: int64 ``[slots, len(ROWS_COLUMNS)]`` on the device: the rest.

    >>> from meswitch_kernels import RowsLeaves, map_rows
    >>> table = RowsTable(2, width=2)
    >>> own = torch.ones(1, 2)
    >>> table.set(1, RowsLeaves(map_rows(5, None, torch.tensor([4]), torch.device("cpu")), own=own))
    >>> table.rows[:, ROWS_COLUMNS.index("known")].tolist()
    [0, 5]
    >>> table.clear(1)
    >>> table.rows.any().item()
    False
    """

    def __init__(self, slots: int, width: int, device: torch.device | str | None = None) -> None:
        self.width = width
        with torch.inference_mode(False):  # written to later, in whatever mode they are made
            self.coded = torch.zeros(slots, len(COLUMNS), dtype=torch.int64, device=device)
            self.rows = torch.zeros(slots, len(ROWS_COLUMNS), dtype=torch.int64, device=device)
        self._held: list[tuple[torch.Tensor, ...]] = [()] * slots

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return len(self._held)

    def resized(self, slots: int) -> RowsTable:
        """Another table with the same experts in more slots; what exists already goes on with this one.

        Raises:
            ValueError: not more slots.
        """
        if slots < self.slots:
            raise ValueError(f"slots is {slots}, expected at least the table's {self.slots}.")
        other = RowsTable(slots, self.width, self.rows.device)
        other.coded[: self.slots] = self.coded
        other.rows[: self.slots] = self.rows
        other._held[: self.slots] = self._held
        return other

    def set(self, slot: int, leaves: RowsLeaves) -> None:
        """Put an expert into a slot, in place of the one there.

        Written by two copies in the order of the current stream; work on other streams that reads the slot is the
        caller's to wait for.

        Raises:
            IndexError: no such slot.
            ValueError: tensors that do not fit, see :func:`~meswitch_kernels.rows_leaves.check_rows_leaves`.
        """
        self._check(slot)
        check_rows_leaves(leaves, self.width, self.rows.device)
        tensors = [leaves.row_map, leaves.own, leaves.bias]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        own_dtype = 0 if leaves.own is None else 1 + OWN_DTYPES.index(leaves.own.dtype)
        coded = [] if leaves.coded is None else list(leaves.coded.tensors().values())
        self._write(slot, _coded_row(leaves.coded), [*addresses, leaves.row_map.shape[0], own_dtype])
        # Aliases rather than the tensors: an owner who swaps a parameter's data would take the old memory along.
        self._held[slot] = tuple(tensor.detach() for tensor in (*tensors, *coded) if tensor is not None)

    def clear(self, slot: int) -> None:
        """Empty a slot; rows of a batch that still name it get the base's.

        Raises:
            IndexError: no such slot.
        """
        self._check(slot)
        self._write(slot, [0] * len(COLUMNS), [0] * len(ROWS_COLUMNS))
        self._held[slot] = ()

    def _check(self, slot: int) -> None:
        if not 0 <= slot < len(self._held):
            raise IndexError(f"slot {slot} is not one of the table's {len(self._held)}.")

    def _write(self, slot: int, coded: list[int], rows: list[int]) -> None:
        self.coded[slot].copy_(torch.tensor(coded, dtype=torch.int64))
        self.rows[slot].copy_(torch.tensor(rows, dtype=torch.int64))


def _coded_row(leaves: DeltaLeaves | None) -> list[int]:
    if leaves is None:
        return [0] * len(COLUMNS)
    tensors = leaves.tensors()
    named = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    row_bytes = leaves.codes.stride(0) if leaves.codes.shape[0] > 1 else 0
    named |= {"bits": leaves.bits, "salient_channels": leaves.salient_channels, "row_bytes": row_bytes}
    return [named.get(column, 0) for column in COLUMNS]
