"""The kernels as torch operators: traceable by ``torch.compile``, and run by Triton where it can."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from .reference import dequantize_delta_reference

try:
    from ._ops import add_op_namespace_prefix  # type: ignore[import-not-found]  # written by kernel-builder
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        """Name of an operator of the source tree, where kernel-builder has not given the build its own namespace."""
        return f"meswitch_kernels_dev::{name}"


_write_with_triton: Callable[..., None] | None = None
if importlib.util.find_spec("triton") is not None:
    from .triton_dequantize import dequantize_delta_triton

    _write_with_triton = dequantize_delta_triton

__all__ = ["capability", "dequantize_delta", "has_kernel", "has_ptx", "is_nvidia", "multiplies_bytes"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernel(device: torch.device) -> bool:
    """Whether Triton runs the kernels for tensors of a device; elsewhere the torch reference does.

    >>> has_kernel(torch.device("meta"))
    False
    """
    if _write_with_triton is None:
        return False
    # Triton's interpreter runs kernels on CPU tensors; Triton reads the same variable.
    return device.type in ("cuda", "xpu") or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def is_nvidia(device: torch.device) -> bool:
    """Whether a device is NVIDIA's: torch calls AMD's "cuda", too.

    >>> is_nvidia(torch.device("cpu"))
    False
    """
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """An NVIDIA device's compute capability, (0, 0) of others.

    >>> capability(torch.device("cpu"))
    (0, 0)
    """
    return torch.cuda.get_device_capability(device) if is_nvidia(device) else (0, 0)


def has_ptx(device: torch.device) -> bool:
    """Whether kernels on a device may use NVIDIA's instructions.

    >>> has_ptx(torch.device("cpu"))
    False
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return is_nvidia(device) and not interpreted


def multiplies_bytes(device: torch.device) -> bool:
    """Whether the kernels multiply bytes on a device: in the interpreter, and where NVIDIA's tensor cores do it.

    >>> multiplies_bytes(torch.device("meta"))
    False
    """
    if device.type == "cpu":
        return has_kernel(device)
    return has_ptx(device) and capability(device) >= (8, 0)


@torch.library.custom_op(add_op_namespace_prefix("dequantize_delta"), mutates_args=())
def _dequantize_delta(
    codes: torch.Tensor,
    step: torch.Tensor,
    bits: int,
    in_features: int,
    salient_index: torch.Tensor | None,
    salient: torch.Tensor | None,
    column_step: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if _write_with_triton is None or not has_kernel(codes.device):
        return dequantize_delta_reference(
            codes,
            step,
            bits,
            in_features,
            salient_index=salient_index,
            salient=salient,
            column_step=column_step,
            dtype=dtype,
        )
    delta = torch.empty(codes.shape[0], in_features, dtype=dtype, device=codes.device)
    _write_with_triton(delta, codes, step, bits, salient_index=salient_index, salient=salient, column_step=column_step)
    return delta


@_dequantize_delta.register_fake
def _(
    codes: torch.Tensor,
    step: torch.Tensor,
    bits: int,
    in_features: int,
    salient_index: torch.Tensor | None,
    salient: torch.Tensor | None,
    column_step: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], in_features, dtype=dtype)


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
    """The dense delta of a linear layer, ``(c - (2 ** bits - 1) / 2) * step[row] * column_step[channel]``.

    The product is taken in float32, in that order, and cast once, so Triton and torch give the same bits. Codes cover
    the channels that are not salient, in ascending order; code ``i`` of a row occupies bits ``[i * bits, (i + 1) *
    bits)`` of the row's little-endian bit stream. The values of the tensors are not checked.

    Args:
        codes: uint8 ``[out, ceil(n * bits / 8)]`` with ``n = in_features - k``.
        step: float32 ``[out]``, step size per output channel.
        bits: bits of one code, 1 to 4.
        in_features: input channels, the ``k`` salient ones included.
        salient_index: int32 ``[k]``, strictly ascending, the salient input channels.
        salient: bfloat16 ``[out, k]``, the delta's columns at the salient channels.
        column_step: float32 ``[n]``, step per non-salient input channel.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``[out, in_features]`` of ``dtype``, on the device of ``codes``.

    Raises:
        ValueError: an unsupported number of bits or dtype, or shapes that do not fit together.

    >>> codes = torch.tensor([[0b10]], dtype=torch.uint8)  # the codes 0 and 1 of channels 0 and 2
    >>> salient = torch.tensor([[9.0]], dtype=torch.bfloat16)
    >>> index = torch.tensor([1], dtype=torch.int32)
    >>> dequantize_delta(codes, torch.tensor([1.0]), 1, 3, salient_index=index, salient=salient)
    tensor([[-0.5000,  9.0000,  0.5000]])
    """
    if bits not in (1, 2, 3, 4):
        raise ValueError(f"bits is {bits!r}, expected 1, 2, 3 or 4.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, _DTYPES))}.")
    out_features = codes.shape[0]
    salient_channels = 0 if salient_index is None else salient_index.shape[0]
    coded = in_features - salient_channels
    _check_shape("codes", codes, (out_features, (coded * bits + 7) // 8))
    _check_shape("step", step, (out_features,))
    if column_step is not None:
        _check_shape("column_step", column_step, (coded,))
    if (salient_index is None) != (salient is None):
        raise ValueError("salient_index and salient belong together; only one of them was given.")
    if salient is not None:
        _check_shape("salient", salient, (out_features, salient_channels))
    return _dequantize_delta(codes, step, bits, in_features, salient_index, salient, column_step, dtype)


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, expected {expected}.")
