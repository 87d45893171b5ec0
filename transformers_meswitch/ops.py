"""The two operations that layers run on a stored delta: make it dense, and multiply by it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .compression.linear import reconstruct_linear
from .delta_format.spec import LinearRecord

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

    Computed in float32 and cast once at the end, so every device gives the same bits.

    Args:
        codes: uint8 ``[out, ceil(n * bits / 8)]``, packed codes of the ``n = in_features - k`` non-salient channels.
        step: float32 ``[out]``, step size per output channel.
        bits: bits of one code, 1 to 4.
        in_features: input channels of the layer, salient ones included.
        salient_index: int32 ``[k]``, ascending, the salient input channels.
        salient: bfloat16 ``[out, k]``, the delta's columns at the salient channels.
        column_step: float32 ``[n]``, step per non-salient input channel.
        dtype: dtype of the result.

    Returns:
        ``[out, in_features]`` of ``dtype``, on the device of ``codes``.

    >>> codes = torch.tensor([[0b1100]], dtype=torch.uint8)  # the two codes 0 and 3
    >>> dequantize_delta(codes, torch.tensor([2.0]), 2, 2)
    tensor([[-3.,  3.]])
    """
    tensors = {"codes": codes, "step": step}
    if column_step is not None:
        tensors["column_step"] = column_step
    if salient_index is not None and salient is not None:
        tensors.update(salient_index=salient_index, salient=salient)
    record = LinearRecord(
        out_features=codes.shape[0],
        in_features=in_features,
        bits=bits,
        salient_channels=0 if salient_index is None else salient_index.shape[0],
        column_step=column_step is not None,
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
        x: ``[..., in_features]``, any floating dtype.
        codes: uint8 ``[out, ceil(n * bits / 8)]``; this and the rest as in :func:`dequantize_delta`.
        step: float32 ``[out]``.
        bits: bits of one code, 1 to 4.
        salient_index: int32 ``[k]``.
        salient: bfloat16 ``[out, k]``.
        column_step: float32 ``[n]``.

    Returns:
        ``[..., out]`` of the dtype of ``x``.

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
