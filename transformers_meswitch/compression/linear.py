"""One linear layer's delta, as the delta format stores it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta_format.spec import LinearRecord
from ..errors import CompressionError
from .levels import dequantize, dequantize_packed, quantize
from .packing import pack
from .saliency import reconstruction_error, select_salient
from .step_size import fit_row_column_steps, fit_step

__all__ = ["QuantizedLinear", "compress_linear", "reconstruct_linear"]


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantised delta: its record and the tensors that the record announces, by leaf name."""

    record: LinearRecord
    tensors: dict[str, Tensor]


def compress_linear(
    delta: Tensor,
    bits: int,
    salient_channels: int,
    second_moment: Tensor | None = None,
    column_steps: bool = False,
) -> QuantizedLinear:
    """Quantise a weight delta, keeping its salient input channels in bfloat16.

    All channels are quantised first; the ``salient_channels`` of largest reconstruction error leave the codes, and the
    step sizes are fitted again to the rest.

    Args:
        delta: float32 ``[out, in]``, any device.
        bits: bits of one code, 1 to 4.
        salient_channels: input channels to keep in bfloat16, at most ``in`` of which exist.
        second_moment: float32 ``[in]``, the diagonal of ``E[x xᵀ]`` of the layer's inputs; `None` weighs all alike.
        column_steps: also fit a step per input channel.

    Raises:
        CompressionError: a NaN or infinite element, a second moment of another length or not finite.

    >>> stored = compress_linear(torch.ones(2, 5), bits=2, salient_channels=1)
    >>> {leaf: tuple(tensor.shape) for leaf, tensor in stored.tensors.items()}
    {'salient_index': (1,), 'salient': (2, 1), 'codes': (2, 1), 'step': (2,)}
    """
    if delta.ndim != 2:
        raise CompressionError(f"the weight delta has shape {tuple(delta.shape)}, expected [out, in].")
    delta = delta.to(torch.float32)
    _require_finite(delta, "the weight delta")
    out_features, in_features = delta.shape
    if second_moment is not None:
        if tuple(second_moment.shape) != (in_features,):
            raise CompressionError(
                f"the second moment has shape {tuple(second_moment.shape)}, expected [{in_features}], one per channel."
            )
        second_moment = second_moment.to(device=delta.device, dtype=torch.float32)
        _require_finite(second_moment, "the second moment of the layer's inputs")
    salient_channels = min(salient_channels, in_features)

    coded = torch.ones(in_features, dtype=torch.bool, device=delta.device)
    tensors: dict[str, Tensor] = {}
    if salient_channels:
        if salient_channels < in_features:
            approximation = _quantize(delta, bits, second_moment, column_steps)[1]
            salient = select_salient(reconstruction_error(delta, approximation, second_moment), salient_channels)
        else:
            salient = torch.arange(in_features, device=delta.device)
        coded[salient] = False
        tensors["salient_index"] = salient.to(torch.int32)
        tensors["salient"] = delta[:, salient].to(torch.bfloat16)
    moment = None if second_moment is None else second_moment[coded]
    tensors |= _quantize(delta[:, coded], bits, moment, column_steps)[0]
    return QuantizedLinear(
        LinearRecord(out_features, in_features, bits, salient_channels, column_step=column_steps), tensors
    )


def _require_finite(tensor: Tensor, what: str) -> None:
    finite = tensor.isfinite()
    if not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        raise CompressionError(
            f"{what} is {tensor[tuple(where)].item()} at {where}, expected finite numbers. "
            "The base or the expert holds NaN or infinite weights; compress an intact checkpoint."
        )


def _quantize(
    delta: Tensor, bits: int, second_moment: Tensor | None, column_steps: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves of a delta all of whose channels are coded, and the values they stand for."""
    column: Tensor | None = None
    if column_steps:
        step, column = fit_row_column_steps(delta, bits, second_moment)
    else:
        step = fit_step(delta, bits, second_moment)
    codes = quantize(delta, step, bits, column)
    tensors = {"codes": pack(codes, bits), "step": step}
    if column is not None:
        tensors["column_step"] = column
    return tensors, dequantize(codes, step, bits, column)


def reconstruct_linear(record: LinearRecord, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight delta that a linear's leaves stand for.

    Args:
        record: the layer's record.
        tensors: its leaves by name, on one device; a ``bias`` among them plays no part.

    Returns:
        float32 ``[out, in]``.

    >>> stored = compress_linear(torch.tensor([[0.5, -0.5, 7.0]]), bits=1, salient_channels=1)
    >>> reconstruct_linear(stored.record, stored.tensors).tolist()
    [[0.5, -0.5, 7.0]]
    """
    values = dequantize_packed(
        tensors["codes"], tensors["step"], record.bits, record.coded_channels, tensors.get("column_step")
    )
    if not record.salient_channels:
        return values
    salient = tensors["salient_index"].to(torch.int64)
    coded = torch.ones(record.in_features, dtype=torch.bool, device=values.device)
    coded[salient] = False
    delta = values.new_empty(record.out_features, record.in_features)
    delta.index_copy_(1, coded.nonzero().squeeze(1), values)
    return delta.index_copy_(1, salient, tensors["salient"].to(torch.float32))
