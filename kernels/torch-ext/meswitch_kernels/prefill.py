"""Linear layers of many rows: an expert's weight is written to scratch memory, chunk by chunk, and multiplied by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from .add_delta import check_add_delta, write_sum
from .scratch_ring import ScratchRing

__all__ = ["PrefillLayer", "Slot", "prefill_linear"]

#: A slot of a table; or a tensor, int32 or int64 ``[1]``, negative for the base alone, that is read on the device.
Slot = int | torch.Tensor

#: Bytes that the bias starts at a multiple of, after the weight.
_ALIGNMENT = 256
#: Bytes of a chunk of the weight: two of them, inputs and outputs have to stay in the cache, 50 MB on an H100.
_CHUNK_BYTES = 16 << 20
#: Output channels that a chunk has a multiple of, so that tiles of the matmul end where it does.
_CHUNK_CHANNELS = 256
#: Multiplications of a chunk's matmul, at least about: what the device does in the time that launching them takes.
_CHUNK_PRODUCTS = 1 << 33


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
class _Chunk:
    """Some output channels of ``W + Δ̂``, ``[channels, in]``, and the expert's bias of these after them."""

    layer: PrefillLayer
    slot: Slot
    first: int
    channels: int
    programs: int | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Chunk) or self.layer is not other.layer:
            return False
        if (self.first, self.channels) != (other.first, other.channels):
            return False
        # Comparing tensors' values would wait for the device.
        if isinstance(self.slot, torch.Tensor) or isinstance(other.slot, torch.Tensor):
            return self.slot is other.slot
        return self.slot == other.slot

    __hash__ = None  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        return self._bias_offset + (self.channels * self.layer.weight.itemsize if self._has_bias else 0)

    def write(self, memory: torch.Tensor, ahead: bool) -> None:
        layer, here = self.layer, self._here
        out, bias_out = self._tensors(memory)
        bias = None if layer.bias is None else layer.bias[here]
        programs = self.programs if ahead else None
        write_sum(layer.weight[here], layer.table, self.slot, out, bias, bias_out, self.first, programs)

    def multiply(self, x: torch.Tensor, y: torch.Tensor, memory: torch.Tensor) -> None:
        """Write these channels of ``y``, ``[rows, out]``; ``x`` is ``[rows, in]``."""
        weight, bias = self._tensors(memory)
        # Libraries for matmuls write rows that lie apart where they belong.
        out = y[:, self._here]
        if bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias, x, weight.T, out=out)

    def _tensors(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight ``[channels, in]`` and bias ``[channels]`` in a buffer."""
        dtype = self.layer.weight.dtype
        weight = memory[: self._weight_bytes].view(dtype).view(self.channels, self.layer.weight.shape[1])
        bias = memory[self._bias_offset : self.nbytes].view(dtype) if self._has_bias else None
        return weight, bias

    @property
    def _here(self) -> slice:
        return slice(self.first, self.first + self.channels)

    @property
    def _has_bias(self) -> bool:
        return self.layer.bias is not None or self.layer.expert_bias

    @property
    def _weight_bytes(self) -> int:
        weight = self.layer.weight
        return self.channels * weight.shape[1] * weight.itemsize

    @property
    def _bias_offset(self) -> int:
        return -(-self._weight_bytes // _ALIGNMENT) * _ALIGNMENT


@torch.no_grad()
def prefill_linear(
    x: torch.Tensor,
    layer: PrefillLayer,
    groups: Sequence[tuple[Slot | None, torch.Tensor | None]],
    ring: ScratchRing,
    *,
    then: tuple[PrefillLayer, Slot] | None = None,
    ahead: bool = True,
    chunk_bytes: int | None = _CHUNK_BYTES,
    programs: int | None = None,
) -> torch.Tensor:
    """``x (W + Δ̂)ᵀ`` and both biases, each row with its own expert's weight.

    For rows by the hundred, whose matmul takes longer than to write its weight once; of fewer,
    :func:`~meswitch_kernels.delta_linear` reads less. Nothing waits for the device, so CUDA graphs capture it. There
    are no gradients.

    An expert's weight is written some output channels at a time, and these are multiplied by before the next ones are
    written over them: so few that the matmul reads them out of the cache, and memory hardly sees them. While they are
    multiplied by, the ring writes the next chunk: of this expert, of the next expert of this layer or, with the last
    one, of what comes next in the model::

        for layer, after in itertools.zip_longest(layers, layers[1:]):
            x = prefill_linear(x, layer, [(slot, None)], ring, then=after and (after, slot))

    Args:
        x: ``[batch, ..., in]`` of the dtype of the weight.
        layer: the layer.
        groups: slot and rows of each expert in the batch: int64 ``[count]`` on the device, indices into the first
            dimension of ``x``, or `None` for all. Each row is in one group. A slot of `None` is the base alone.
        ring: scratch memory, the same for all layers.
        then: layer and slot of the next call with an expert, on this thread and stream, of as many rows in all and the
            same ``chunk_bytes``. Its tensors, table and expert may not change in between, and within a CUDA graph's
            capture it has to come.
        ahead: whether anything is written while something is multiplied by. ``then`` plays no part otherwise.
        chunk_bytes: at most so many bytes of a weight at a time, or 256 output channels if these have more; more also
            where there are so few rows that launching a chunk's work would take longer than the work. `None` for the
            whole weight.
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
    for owner, slot in [*((layer, slot) for slot, _ in groups if slot is not None), *([] if then is None else [then])]:
        check_add_delta(owner.weight, owner.table, slot, None, owner.bias, None)
    # Of all experts together, so that the next layer, whose chunk is announced, divides its weight likewise.
    rows = x.shape[:-1].numel()
    chunks = [[] if slot is None else _chunks(layer, slot, rows, chunk_bytes, programs) for slot, _ in groups]
    following = [*itertools.chain(*chunks)][1:]
    if then is not None:
        following += _chunks(*then, rows, chunk_bytes, programs)[:1]
    announced = iter(following if ahead else ())

    def multiply(inputs: torch.Tensor, parts: list[_Chunk]) -> torch.Tensor:
        if not parts:
            return F.linear(inputs, layer.weight, layer.bias)
        outputs = inputs.new_empty(*inputs.shape[:-1], layer.weight.shape[0])
        flat = inputs.flatten(0, -2), outputs.flatten(0, -2)
        for part in parts:
            ring.use(part, partial(part.multiply, *flat), next(announced, None))
        return outputs

    if len(groups) == 1 and groups[0][1] is None:
        return multiply(x, chunks[0])
    y = x.new_empty(*x.shape[:-1], layer.weight.shape[0])
    for (_, rows_here), parts in zip(groups, chunks, strict=True):
        assert rows_here is not None
        y.index_copy_(0, rows_here, multiply(x.index_select(0, rows_here), parts))
    return y


def _chunks(layer: PrefillLayer, slot: Slot, rows: int, chunk_bytes: int | None, programs: int | None) -> list[_Chunk]:
    """A weight in chunks of the same size, but for the last; none where there are no output channels.

    Args:
        layer: the layer.
        slot: its expert.
        rows: rows that are multiplied by the weight.
        chunk_bytes: most bytes of a chunk's weight; `None`: no limit.
        programs: of the writer, if it writes ahead.
    """
    out, width = layer.weight.shape
    channels = max(out, 1)
    if chunk_bytes is not None and layer.weight.numel() > 0 and rows > 0:
        products = _CHUNK_CHANNELS * width
        units = -(-out // _CHUNK_CHANNELS)
        most = max(1, chunk_bytes // (products * layer.weight.itemsize), -(-_CHUNK_PRODUCTS // (rows * products)))
        # As many chunks as that takes, among which the channels are shared out.
        channels = -(-units // -(-units // most)) * _CHUNK_CHANNELS
    return [_Chunk(layer, slot, first, min(channels, out - first), programs) for first in range(0, out, channels)]


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
