"""The two operations that layers run on a stored delta: make it dense, and multiply by it.

Both run the Triton kernels of ``meswitch_kernels`` where Triton runs, and :mod:`transformers_meswitch.compression` on
torch everywhere else. The two paths give the same bits.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

import meswitch_kernels

from .compression.linear import reconstruct_linear
from .delta_format.spec import LinearRecord
from .errors import DeltaFormatError

__all__ = ["delta_linear", "dequantize_delta"]


def dequantize_delta(
    codes: torch.Tensor,
    step: torch.Tensor,
    bits: int,
    in_features: int,
    *,
    salient_index: torch.Tensor | None = None,
    salient: torch.Tensor | None = None,
    column_step: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The dense delta of a linear layer.

    Computed in float32 and cast once at the end, so every device gives the same bits. Values of the tensors (finite
    steps, ascending indices in range) are the reader's to check; here only sizes are.

    Args:
        codes: uint8 ``[out, ceil(n * bits / 8)]``, packed codes of the ``n = in_features - k`` non-salient channels.
        step: float32 ``[out]``, step size per output channel.
        bits: bits of one code, 1 to 4.
        in_features: input channels of the layer, salient ones included.
        salient_index: int32 ``[k]``, ascending, the salient input channels.
        salient: bfloat16 ``[out, k]``, the delta's columns at the salient channels.
        column_step: float32 ``[n]``, step per non-salient input channel.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[out, in_features]`` of ``dtype``, on the device of ``codes``.

    Raises:
        DeltaFormatError: a tensor of another shape than the others call for.

    >>> codes = torch.tensor([[0b1100]], dtype=torch.uint8)  # the two codes 0 and 3
    >>> dequantize_delta(codes, torch.tensor([2.0]), 2, 2)
    tensor([[-3.,  3.]])
    """
    record = LinearRecord(
        out_features=codes.shape[0],
        in_features=in_features,
        bits=bits,
        salient_channels=0 if salient_index is None else salient_index.shape[0],
        column_step=column_step is not None,
    )
    given = {
        "codes": codes,
        "step": step,
        "column_step": column_step,
        "salient_index": salient_index,
        "salient": salient,
    }
    tensors = {leaf: tensor for leaf, tensor in given.items() if tensor is not None}
    for leaf, (_, shape) in record.leaves().items():
        if leaf not in tensors or tuple(tensors[leaf].shape) != shape:
            found = tuple(tensors[leaf].shape) if leaf in tensors else None
            raise DeltaFormatError(
                f"{leaf} of a delta with {bits} bits, {in_features} input and {codes.shape[0]} output channels is of "
                f"shape {found}, expected {shape}."
            )
    if meswitch_kernels.has_kernel(codes.device):
        return meswitch_kernels.dequantize_delta(
            codes,
            step,
            bits,
            in_features,
            salient_index=salient_index,
            salient=salient,
            column_step=column_step,
            dtype=dtype,
        )
    return reconstruct_linear(record, tensors).to(dtype)


def delta_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    step: torch.Tensor,
    bits: int,
    *,
    salient_index: torch.Tensor | None = None,
    salient: torch.Tensor | None = None,
    column_step: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ Δ̂ᵀ``, with the delta cast to the dtype of ``x``.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16.
        codes: uint8 ``[out, ceil(n * bits / 8)]``; this and the rest as in :func:`dequantize_delta`.
        step: float32 ``[out]``.
        bits: bits of one code, 1 to 4.
        salient_index: int32 ``[k]``.
        salient: bfloat16 ``[out, k]``.
        column_step: float32 ``[n]``.

    Returns:
        ``[..., out]`` of the dtype of ``x``.

    Raises:
        DeltaFormatError: as :func:`dequantize_delta`.

    >>> codes = torch.tensor([[0b1100]], dtype=torch.uint8)
    >>> delta_linear(torch.tensor([[1.0, 2.0]]), codes, torch.tensor([2.0]), 2)
    tensor([[3.]])
    """
    delta = dequantize_delta(
        codes,
        step,
        bits,
        x.shape[-1],
        salient_index=salient_index,
        salient=salient,
        column_step=column_step,
        dtype=x.dtype,
    )
    return F.linear(x, delta)
