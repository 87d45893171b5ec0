"""Linear layers of many rows: an expert's whole weight is written to scratch memory and multiplied by at full rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .add_delta import add_delta
from .scratch_ring import ScratchRing

__all__ = ["PrefillLayer", "Slot", "prefill_linear"]

#: A slot of a table; or a tensor, int32 or int64 ``[1]``, negative for the base alone, that is read on the device.
Slot = int | torch.Tensor

#: Bytes that the bias starts at a multiple of, after the weight.
_ALIGNMENT = 256


@dataclass(frozen=True, eq=False)
class PrefillLayer:
    """A linear layer, as long as its tensors stay the same: one that is made anew is another to the ring.

    Attributes:
        weight: ``[out, in]``, float32, bfloat16 or float16: the base's. Any strides.
        table: int64 ``[slots, len(COLUMNS)]``, the ``rows`` of its :class:`~meswitch_kernels.ExpertTable`.
        bias: ``[out]`` of the dtype of ``weight``, the base's.
        expert_bias: whether an expert may bring a bias although the base has none.
    """

    weight: torch.Tensor
    table: torch.Tensor
    bias: torch.Tensor | None = None
    expert_bias: bool = False


@dataclass(frozen=True, eq=False)
class _ExpertWeight:
    """``W + Δ̂``, and the expert's bias after it."""

    layer: PrefillLayer
    slot: Slot
    programs: int | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _ExpertWeight) or self.layer is not other.layer:
            return False
        # Comparing tensors' values would wait for the device.
        if isinstance(self.slot, torch.Tensor) or isinstance(other.slot, torch.Tensor):
            return self.slot is other.slot
        return self.slot == other.slot

    __hash__ = None  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        weight = self.layer.weight
        return self._bias_offset + (weight.shape[0] * weight.itemsize if self._has_bias else 0)

    def write(self, memory: torch.Tensor, ahead: bool) -> None:
        layer = self.layer
        weight, bias = self.tensors(memory)
        programs = self.programs if ahead else None
        add_delta(layer.weight, layer.table, self.slot, out=weight, bias=layer.bias, bias_out=bias, programs=programs)

    def tensors(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight ``[out, in]`` and bias ``[out]`` in a buffer."""
        weight = self.layer.weight
        flat = memory[: weight.numel() * weight.itemsize].view(weight.dtype)
        bias = memory[self._bias_offset : self.nbytes].view(weight.dtype) if self._has_bias else None
        return flat.view(weight.shape), bias

    @property
    def _has_bias(self) -> bool:
        return self.layer.bias is not None or self.layer.expert_bias

    @property
    def _bias_offset(self) -> int:
        weight = self.layer.weight
        return -(-weight.numel() * weight.itemsize // _ALIGNMENT) * _ALIGNMENT


@torch.no_grad()
def prefill_linear(
    x: torch.Tensor,
    layer: PrefillLayer,
    groups: Sequence[tuple[Slot | None, torch.Tensor | None]],
    ring: ScratchRing,
    *,
    then: tuple[PrefillLayer, Slot] | None = None,
    programs: int | None = None,
) -> torch.Tensor:
    """``x (W + Δ̂)ᵀ`` and both biases, each row with its own expert's weight, by one matmul an expert.

    For rows by the hundred, whose matmul takes longer than to write its weight once; of fewer,
    :func:`~meswitch_kernels.delta_linear` reads less. Nothing waits for the device, so CUDA graphs capture it. There
    are no gradients.

    While an expert's rows are multiplied, the ring writes the weight of the next expert of this layer or, with the
    last one, of what comes next in the model::

        for layer, after in itertools.zip_longest(layers, layers[1:]):
            x = prefill_linear(x, layer, [(slot, None)], ring, then=after and (after, slot))

    Args:
        x: ``[batch, ..., in]`` of the dtype of the weight.
        layer: the layer.
        groups: slot and rows of each expert in the batch: int64 ``[count]`` on the device, indices into the first
            dimension of ``x``, or `None` for all. Each row is in one group. A slot of `None` is the base alone.
        ring: scratch memory, the same for all layers.
        then: layer and slot of the next call with an expert, on this thread and stream; best after a large matmul.
            Its tensors, table and expert may not change in between, and within a CUDA graph's capture it has to come.
        programs: the kernel that writes ahead starts at most so many, to leave multiprocessors to the matmul.

    Returns:
        ``[batch, ..., out]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or groups that do not share out the rows.
        IndexError: no such slot.

    >>> from meswitch_kernels import DeltaLeaves, ExpertTable, align_rows
    >>> table = ExpertTable(1, out_features=1, in_features=2)
    >>> codes = align_rows(torch.tensor([[0b1100]], dtype=torch.uint8))  # the codes 0 and 3
    >>> table.set(0, DeltaLeaves(codes, torch.tensor([2.0]), bits=2))
    >>> layer = PrefillLayer(torch.tensor([[10.0, 20.0]]), table.rows)
    >>> groups = [(None, torch.tensor([0])), (0, torch.tensor([1]))]
    >>> prefill_linear(torch.ones(2, 2), layer, groups, ScratchRing("cpu"))
    tensor([[30.],
            [30.]])
    """
    _check(x, layer, groups, ring)
    contents = [_ExpertWeight(layer, slot, programs) for slot, _ in groups if slot is not None]
    # Each with what comes after it.
    turns = zip(contents, [*contents[1:], None if then is None else _ExpertWeight(*then, programs)], strict=False)

    def multiply(inputs: torch.Tensor, slot: Slot | None) -> torch.Tensor:
        return F.linear(inputs, layer.weight, layer.bias) if slot is None else _by_scratch(inputs, ring, *next(turns))

    if len(groups) == 1 and groups[0][1] is None:
        return multiply(x, groups[0][0])
    y = x.new_empty(*x.shape[:-1], layer.weight.shape[0])
    for slot, rows in groups:
        assert rows is not None
        y.index_copy_(0, rows, multiply(x.index_select(0, rows), slot))
    return y


def _by_scratch(
    x: torch.Tensor, ring: ScratchRing, content: _ExpertWeight, then: _ExpertWeight | None
) -> torch.Tensor:
    return ring.use(content, lambda memory: F.linear(x, *content.tensors(memory)), then)


def _check(
    x: torch.Tensor,
    layer: PrefillLayer,
    groups: Sequence[tuple[Slot | None, torch.Tensor | None]],
    ring: ScratchRing,
) -> None:
    weight = layer.weight
    if x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is of shape {tuple(x.shape)}, expected [batch, ..., {weight.shape[1]}].")
    if x.dtype != weight.dtype or not x.device == weight.device == ring.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, but weight is {weight.dtype} on {weight.device} and the ring on "
            f"{ring.device}."
        )
    shared_out = sum(x.shape[0] if rows is None else rows.shape[0] for _, rows in groups)
    if shared_out != x.shape[0] or (len(groups) > 1 and any(rows is None for _, rows in groups)):
        raise ValueError(f"groups have {shared_out} rows in all, but x has {x.shape[0]}; each belongs to one group.")
