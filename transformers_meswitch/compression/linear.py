"""One linear layer's delta, as the delta format stores it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta_format.spec import LinearRecord
from ..errors import CompressionError
from .compensation import compensate
from .covariance import fit_column_steps, fit_levels_and_step, refit_step, salient_absorption
from .differences import Difference
from .finite import require_finite
from .levels import codes_of, dequantize, dequantize_packed, quantize
from .packing import pack
from .row_codes import DELTA_NOT_FINITE, code_rows, salient_channels_of
from .saliency import reconstruction_error, select_salient
from .step_size import fit_row_column_steps, fit_step

__all__ = ["QuantizedLinear", "compress_linear", "reconstruct_linear"]


#: Share of the median second moment that a channel has at least: one that was silent in the calibration text may not
#: be elsewhere, so what a fine-tune changed there is not worth nothing.
_UNSEEN = 1e-5


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantised delta: its record and the tensors that the record announces, by leaf name."""

    record: LinearRecord
    tensors: dict[str, Tensor]


def compress_linear(
    delta: Tensor | Difference,
    bits: int,
    salient_channels: int,
    second_moment: Tensor | None = None,
    column_steps: bool = False,
) -> QuantizedLinear:
    """Quantise a weight delta, keeping its salient input channels in bfloat16.

    All channels are quantised first; the ``salient_channels`` of largest reconstruction error leave the codes, and the
    step sizes are fitted again to the rest. Given the whole second-moment matrix, steps are fitted to it in closed
    form, and the salient columns take up what they can of the codes' errors, see :mod:`.covariance`.

    Args:
        delta: float32 ``[out, in]``, any device; or the two matrices whose difference it is, which is then formed a
            few rows at a time where that will do.
        bits: bits of one code, 1 to 4.
        salient_channels: input channels to keep in bfloat16, at most ``in`` of which exist.
        second_moment: of the layer's inputs: float32 ``[in, in]``, ``E[x xᵀ]``; or float32 ``[in]``, its diagonal;
            `None` weighs all channels alike.
        column_steps: also fit a step per input channel.

    Raises:
        CompressionError: a NaN or infinite element; one too large for the delta format; a second moment of another
            shape or not finite.

    >>> stored = compress_linear(torch.ones(2, 5), bits=2, salient_channels=1)
    >>> {leaf: tuple(tensor.shape) for leaf, tensor in stored.tensors.items()}
    {'codes': (2, 1), 'step': (2,), 'salient_index': (1,), 'salient': (2, 1)}
    """
    difference = delta if isinstance(delta, Difference) else Difference.to_zero(delta)
    if len(difference.shape) != 2:
        raise CompressionError(f"the weight delta has shape {tuple(difference.shape)}, expected [out, in].")
    out_features, in_features = difference.shape
    covariance = diagonal = None
    if second_moment is not None:
        second_moment = _checked_moment(second_moment.to(device=difference.device, dtype=torch.float32), in_features)
        diagonal = second_moment if second_moment.ndim == 1 else second_moment.diagonal()
        seen = diagonal[diagonal > 0]
        if len(seen):
            diagonal = diagonal.clamp_min(_UNSEEN * seen.median())
        if second_moment.ndim == 2 and len(seen):
            # Scaled to a largest diagonal of one, as the diagonal alone is for its fit: products stay in range.
            covariance = second_moment / diagonal.max()
            covariance.diagonal().copy_(diagonal / diagonal.max())
    salient_channels = min(salient_channels, in_features)

    record = LinearRecord(out_features, in_features, bits, salient_channels, column_step=column_steps)
    if covariance is None and not column_steps and out_features and in_features:
        found = code_rows(difference, bits, salient_channels, diagonal)
        tensors = {"codes": found.codes, "step": found.step}
        if salient_channels:
            tensors |= {"salient_index": found.salient_index.to(torch.int32), "salient": found.salient.bfloat16()}
        _require_representable(difference, tensors)
        return QuantizedLinear(record, tensors)

    delta = difference.whole()
    require_finite(delta, *DELTA_NOT_FINITE)
    salient = torch.arange(in_features, device=delta.device)[:salient_channels]
    if 0 < salient_channels < in_features:
        if column_steps:
            approximation = _fit_diagonal(delta, bits, diagonal, column_steps).values(delta, bits)
            salient = select_salient(reconstruction_error(delta, approximation, diagonal), salient_channels)
        else:
            salient = salient_channels_of(difference, bits, salient_channels, diagonal)
    is_coded = torch.ones(in_features, dtype=torch.bool, device=delta.device)
    is_coded[salient] = False
    coded = is_coded.nonzero().squeeze(1)

    rest, columns = delta[:, coded], delta[:, salient]
    steps = _fit_diagonal(rest, bits, None if diagonal is None else diagonal[coded], column_steps)
    codes = quantize(rest, steps.row, bits, steps.column)
    if covariance is not None and len(coded):
        absorption = salient_absorption(covariance, coded, salient)
        del covariance  # as large as all moments of a layer, and not needed beside what is left of it
        steps, codes = _fit_covariance(rest, bits, absorption.remaining, steps)
        columns = columns + (rest - dequantize(codes, steps.row, bits, steps.column)) @ absorption.weights

    tensors = {"codes": pack(codes, bits), "step": steps.row}
    if steps.column is not None:
        tensors["column_step"] = steps.column
    if salient_channels:
        tensors |= {"salient_index": salient.to(torch.int32), "salient": columns.to(torch.bfloat16)}
    _require_representable(difference, tensors)
    return QuantizedLinear(record, tensors)


def _checked_moment(second_moment: Tensor, in_features: int) -> Tensor:
    if tuple(second_moment.shape) not in ((in_features,), (in_features, in_features)):
        raise CompressionError(
            f"the second moment has shape {tuple(second_moment.shape)}, expected [{in_features}] or "
            f"[{in_features}, {in_features}]: one per channel, or one per pair of channels."
        )
    require_finite(
        second_moment,
        "the second moment of the layer's inputs",
        "The expert's activations overflow on the calibration text, its weights are finite: leave calibration out, or "
        "calibrate on other text.",
    )
    return second_moment


def _require_representable(delta: Difference, tensors: Mapping[str, Tensor]) -> None:
    for leaf, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            peak = delta.whole().abs().max().item()
            raise CompressionError(
                f"the weight delta reaches {peak:.3g}, for which {leaf} overflows {tensor.dtype}. "
                "No fine-tune is so far from its base; compress an intact checkpoint."
            )


@dataclass(frozen=True)
class _Steps:
    """Step sizes: float32 ``[out]``, and float32 ``[n]`` where there is one per column."""

    row: Tensor
    column: Tensor | None

    def values(self, delta: Tensor, bits: int) -> Tensor:
        """What a delta becomes at these steps, each element rounded to the nearest level."""
        return dequantize(quantize(delta, self.row, bits, self.column), self.row, bits, self.column)


def _fit_diagonal(delta: Tensor, bits: int, diagonal: Tensor | None, column_steps: bool) -> _Steps:
    if column_steps:
        return _Steps(*fit_row_column_steps(delta, bits, diagonal))
    return _Steps(fit_step(delta, bits, diagonal), None)


def _fit_covariance(delta: Tensor, bits: int, covariance: Tensor, steps: _Steps) -> tuple[_Steps, Tensor]:
    """Steps and codes that lose least under a whole covariance, from the steps that a diagonal fit gave."""
    column = steps.column
    levels, row = fit_levels_and_step(delta, bits, covariance, steps.row, column)
    if column is not None:
        column = fit_column_steps(delta, levels, covariance, row, column)
        row = refit_step(delta, levels * column, covariance, row)
    levels, row, column = compensate(delta, bits, covariance, levels, row, column)
    unused = (row == 0)[:, None] if column is None else (row == 0)[:, None] | (column == 0)
    return _Steps(row, column), codes_of(levels, bits).masked_fill_(unused, 0)


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
