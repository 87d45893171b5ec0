"""The operations that layers run on a stored delta: make it dense, add it to a weight, and multiply by it.

They trust their input: a delta is checked when it is loaded, not at every step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

import meswitch_kernels

from .compression.linear import reconstruct_linear
from .delta_format.spec import LinearRecord

__all__ = ["delta_linear", "dequantize_delta", "merged_weight", "runs_kernels"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_kernels(device: torch.device) -> bool:
    """Whether layers on a device read codes through kernels, rather than make deltas dense.

    On NVIDIA's devices, where the kernels for decoding and merging have been run and measured, and on a CPU in
    Triton's interpreter; on others, AMD's among them, they have not been.

    >>> runs_kernels(torch.device("meta"))
    False
    """
    return meswitch_kernels.has_kernel(device) and (device.type == "cpu" or meswitch_kernels.is_nvidia(device))


def dequantize_delta(
    record: LinearRecord, leaves: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The dense delta of a linear layer.

    Computed in float32 and cast once at the end, so Triton and torch, GPU and CPU give the same bits.

    Args:
        record: the layer's record.
        leaves: its tensors by leaf (``codes``, ``step``, ...), on one device; a ``bias`` among them plays no part.
        dtype: dtype of the result.

    Returns:
        ``[out, in]`` of ``dtype``, on the device of the codes.

    >>> record = LinearRecord(out_features=1, in_features=2, bits=2)
    >>> leaves = {"codes": torch.tensor([[0b1100]], dtype=torch.uint8), "step": torch.tensor([2.0])}  # codes 0 and 3
    >>> dequantize_delta(record, leaves)
    tensor([[-3.,  3.]])
    """
    if not meswitch_kernels.has_kernel(leaves["codes"].device):
        return reconstruct_linear(record, leaves).to(dtype)
    return meswitch_kernels.dequantize_delta(
        leaves["codes"],
        leaves["step"],
        record.bits,
        record.in_features,
        salient_index=leaves.get("salient_index"),
        salient=leaves.get("salient"),
        column_step=leaves.get("column_step"),
        dtype=dtype,
    )


def merged_weight(record: LinearRecord, leaves: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """``W + Δ̂``, added in float32 and rounded once, the same bits on all devices.

    Args:
        record: the layer's record.
        leaves: its tensors, as for :func:`dequantize_delta`.
        weight: ``[out, in]``, floating point: the base's, on the same device. Any strides.

    Returns:
        A new tensor like ``weight``, of its strides if those leave no gaps.

    >>> record = LinearRecord(out_features=1, in_features=2, bits=2)
    >>> leaves = {"codes": torch.tensor([[0b1100]], dtype=torch.uint8), "step": torch.tensor([2.0])}
    >>> merged_weight(record, leaves, torch.tensor([[10.0, 20.0]]))
    tensor([[ 7., 23.]])
    """
    if not runs_kernels(weight.device) or weight.dtype not in _KERNEL_DTYPES:
        return (weight.float() + dequantize_delta(record, leaves)).to(weight.dtype)
    return meswitch_kernels.merged_weight(
        weight,
        meswitch_kernels.DeltaLeaves(
            codes=leaves["codes"],
            step=leaves["step"],
            bits=record.bits,
            column_step=leaves.get("column_step"),
            salient_index=leaves.get("salient_index"),
            salient=leaves.get("salient"),
        ),
    )


def delta_linear(x: torch.Tensor, record: LinearRecord, leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``x @ Δ̂ᵀ``, with the delta cast to the dtype of ``x``.

    Args:
        x: ``[..., in]``, float32, bfloat16 or float16.
        record: the layer's record.
        leaves: its tensors, as for :func:`dequantize_delta`.

    Returns:
        ``[..., out]`` of the dtype of ``x``; a stored bias is not added.

    >>> record = LinearRecord(out_features=1, in_features=2, bits=2)
    >>> leaves = {"codes": torch.tensor([[0b1100]], dtype=torch.uint8), "step": torch.tensor([2.0])}
    >>> delta_linear(torch.tensor([[1.0, 2.0]]), record, leaves)
    tensor([[3.]])
    """
    return F.linear(x, dequantize_delta(record, leaves, x.dtype))
