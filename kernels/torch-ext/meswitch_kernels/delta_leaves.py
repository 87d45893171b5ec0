"""The tensors of one linear's delta, and the layout of its codes that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["ROW_ALIGNMENT", "DeltaLeaves", "align_rows", "blank_codes", "check_leaves"]

#: Bytes that the start of each row of codes is a multiple of: the widest load of a thread.
ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class DeltaLeaves:
    """The delta of one linear layer, ``k`` of whose ``in_features`` input channels are salient; ``n`` are not.

    Attributes:
        codes: uint8 ``[out, ceil(n * bits / 8)]``, in the bit order of :func:`meswitch_kernels.dequantize_delta`.
        step: float32 ``[out]``, step size per output channel.
        bits: bits of one code, 1 to 4.
        column_step: float32 ``[n]``, step per non-salient input channel.
        salient_index: int32 ``[k]``, strictly ascending, the salient input channels.
        salient: bfloat16 ``[out, k]``, the delta's columns at the salient channels.
        bias: float32 ``[out]``, the expert's bias minus the base's.
    """

    codes: torch.Tensor
    step: torch.Tensor
    bits: int
    column_step: torch.Tensor | None = None
    salient_index: torch.Tensor | None = None
    salient: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def salient_channels(self) -> int:
        """The number ``k`` of salient input channels."""
        return 0 if self.salient_index is None else self.salient_index.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors there are, by name."""
        named = {name: getattr(self, name) for name in _DTYPES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


_DTYPES = {
    "codes": torch.uint8,
    "step": torch.float32,
    "column_step": torch.float32,
    "salient_index": torch.int32,
    "salient": torch.bfloat16,
    "bias": torch.float32,
}


def align_rows(codes: torch.Tensor) -> torch.Tensor:
    """Codes whose rows start at multiples of :data:`ROW_ALIGNMENT` bytes, as the kernels read them.

    Args:
        codes: uint8 ``[out, width]``.

    Returns:
        The same values in the same shape, a view of memory whose rows are padded; ``codes`` itself where it is aligned
        already. Padding bytes are never used, but they are read.

    >>> aligned = align_rows(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8))
    >>> aligned.tolist(), aligned.stride()
    ([[1, 2], [3, 4]], (16, 1))
    """
    if _is_aligned(codes):
        return codes
    aligned = blank_codes(codes.shape, codes.device)
    aligned.copy_(codes)
    return aligned


def blank_codes(shape: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """Zeros, to be filled, whose rows start where :func:`align_rows` has them: uint8 ``[out, width]``.

    >>> blank_codes((2, 5)).stride()
    (16, 1)
    """
    out, width = shape
    return torch.zeros(out, _aligned_width(width), dtype=torch.uint8, device=device)[:, :width]


def check_leaves(leaves: DeltaLeaves, out_features: int, in_features: int, device: torch.device) -> None:
    """Refuse what the kernels would read wrongly: they see addresses, not tensors.

    Args:
        leaves: the delta.
        out_features: output channels of the layer.
        in_features: input channels of the layer, the salient ones included.
        device: device of the layer.

    Raises:
        ValueError: unsupported bits, or a tensor of another dtype, shape, device or layout. Values are not checked.
    """
    if leaves.bits not in (1, 2, 3, 4):
        raise ValueError(f"bits is {leaves.bits!r}, expected 1, 2, 3 or 4.")
    if (leaves.salient_index is None) != (leaves.salient is None):
        raise ValueError("salient_index and salient belong together; only one of them was given.")
    salient = leaves.salient_channels
    coded = in_features - salient
    shapes = {
        "codes": (out_features, (coded * leaves.bits + 7) // 8),
        "step": (out_features,),
        "column_step": (coded,),
        "salient_index": (salient,),
        "salient": (out_features, salient),
        "bias": (out_features,),
    }
    for name, tensor in leaves.tensors().items():
        if tensor.dtype != _DTYPES[name]:
            raise ValueError(f"{name} is of dtype {tensor.dtype}, expected {_DTYPES[name]}.")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, expected {shapes[name]}.")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the layer is on {device}.")
        if name != "codes" and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it has to be contiguous.")
    if not _is_aligned(leaves.codes):
        raise ValueError(
            f"codes of strides {leaves.codes.stride()} do not have rows at multiples of {ROW_ALIGNMENT} bytes; "
            "make them so with align_rows(codes)."
        )


def _aligned_width(width: int) -> int:
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _is_aligned(codes: torch.Tensor) -> bool:
    if codes.numel() == 0:
        return True
    out, width = codes.shape
    stride = codes.stride(0) if out > 1 else _aligned_width(width)
    # Whole multiples of the alignment are read, so the last row's padding has to exist.
    last = codes.storage_offset() + (out - 1) * stride + _aligned_width(width)
    return (
        (width == 1 or codes.stride(1) == 1)
        and stride % ROW_ALIGNMENT == 0
        and stride >= width
        and codes.data_ptr() % ROW_ALIGNMENT == 0
        and last <= codes.untyped_storage().nbytes()
    )
