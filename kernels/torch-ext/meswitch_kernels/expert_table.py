"""The device table through which the kernels find the experts' tensors: one row a slot, written in place."""

from __future__ import annotations

import torch

from .delta_leaves import DeltaLeaves, check_leaves

__all__ = ["COLUMNS", "ExpertTable"]

#: Columns of the table. The first six are addresses, 0 for a tensor that the expert lacks. ``bits`` is 0 in an empty
#: slot; ``row_bytes`` is the distance in bytes between two rows of codes.
COLUMNS = (
    "codes",
    "step",
    "column_step",
    "salient_index",
    "salient",
    "bias",
    "bits",
    "salient_channels",
    "row_bytes",
)


class ExpertTable:
    """Addresses of the deltas of one linear layer that are resident on a device.

    Kernels read the table when they run, so an expert that is loaded into a slot, or replaced there, is seen by CUDA
    graphs and compiled code that exist already. Experts of unlike bits and sizes share one table.

    The tensors stay the owner's, who may not move, resize or free them while they are in a slot: after
    ``module.to(...)`` set the slot again. The table holds an alias of each tensor until its slot is set again or
    cleared, so an address never outlives its memory.

    Args:
        slots: how many experts fit.
        out_features: output channels of the layer.
        in_features: input channels of the layer, the salient ones included.
        device: device of the layer.

    Attributes:
        rows: int64 ``[slots, len(COLUMNS)]`` on the device: what the kernels read.

    >>> from meswitch_kernels import align_rows
    >>> table = ExpertTable(2, out_features=1, in_features=2)
    >>> codes = align_rows(torch.tensor([[0b1100]], dtype=torch.uint8))  # the codes 0 and 3
    >>> table.set(1, DeltaLeaves(codes, torch.tensor([2.0]), bits=2))
    >>> table.rows[:, COLUMNS.index("bits")].tolist()
    [0, 2]
    >>> table.clear(1)
    >>> table.rows.any().item()
    False
    """

    def __init__(
        self, slots: int, out_features: int, in_features: int, device: torch.device | str | None = None
    ) -> None:
        self.out_features = out_features
        self.in_features = in_features
        with torch.inference_mode(False):  # written to later, in whatever mode it is made
            self.rows = torch.zeros(slots, len(COLUMNS), dtype=torch.int64, device=device)
        self._held: list[tuple[torch.Tensor, ...]] = [()] * slots

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return len(self._held)

    def resized(self, slots: int) -> ExpertTable:
        """Another table of the layer with the same experts in more slots; what exists already goes on with this one.

        Raises:
            ValueError: not more slots.
        """
        if slots < self.slots:
            raise ValueError(f"slots is {slots}, expected at least the table's {self.slots}.")
        other = ExpertTable(slots, self.out_features, self.in_features, self.rows.device)
        other.rows[: self.slots] = self.rows
        other._held[: self.slots] = self._held
        return other

    def set(self, slot: int, leaves: DeltaLeaves) -> None:
        """Put an expert into a slot, in place of the one there.

        The row is written by one copy in the order of the current stream; work on other streams that reads the slot
        is the caller's to wait for.

        Raises:
            IndexError: no such slot.
            ValueError: tensors that do not fit the layer, see :func:`~meswitch_kernels.delta_leaves.check_leaves`.
        """
        self._check(slot)
        check_leaves(leaves, self.out_features, self.in_features, self.rows.device)
        tensors = leaves.tensors()
        addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in COLUMNS[:6]]
        row_bytes = leaves.codes.stride(0) if self.out_features > 1 else 0
        self._write(slot, [*addresses, leaves.bits, leaves.salient_channels, row_bytes])
        # Aliases rather than the tensors: an owner who swaps a parameter's data would take the old memory along.
        self._held[slot] = tuple(tensor.detach() for tensor in tensors.values())

    def clear(self, slot: int) -> None:
        """Empty a slot; rows of a batch that still name it get the base's output.

        Raises:
            IndexError: no such slot.
        """
        self._check(slot)
        self._write(slot, [0] * len(COLUMNS))
        self._held[slot] = ()

    def _check(self, slot: int) -> None:
        if not 0 <= slot < len(self._held):
            raise IndexError(f"slot {slot} is not one of the table's {len(self._held)}.")

    def _write(self, slot: int, row: list[int]) -> None:
        self.rows[slot].copy_(torch.tensor(row, dtype=torch.int64))
