"""The kernels' arithmetic in plain torch: what they are tested against, and what runs where Triton does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .delta_leaves import DeltaLeaves

__all__ = ["add_delta_reference", "delta_linear_reference", "dequantize_delta_reference"]


def dequantize_delta_reference(
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
    """The dense delta of a linear layer; arguments and result as in :func:`meswitch_kernels.dequantize_delta`.

    >>> codes = torch.tensor([[0b1100]], dtype=torch.uint8)  # the two codes 0 and 3
    >>> dequantize_delta_reference(codes, torch.tensor([2.0]), 2, 2)
    tensor([[-3.,  3.]])
    """
    out_features = codes.shape[0]
    channels = torch.arange(in_features, device=codes.device)
    delta = torch.zeros(out_features, in_features, device=codes.device)
    if salient_index is not None and salient is not None:
        position = salient_index.to(torch.int64)
        channels = channels[torch.isin(channels, position, invert=True)]
        delta[:, position] = salient.to(torch.float32)
    coded = channels.shape[0]
    if coded:
        first_bit = torch.arange(coded, device=codes.device) * bits
        low_byte = first_bit // 8
        # Only a 3-bit code can end in the next byte; clamping keeps the read of the last code inside the row.
        high_byte = (low_byte + 1).clamp(max=codes.shape[1] - 1)
        word = codes[:, low_byte].to(torch.int32) | codes[:, high_byte].to(torch.int32) << 8
        code = word >> (first_bit % 8).to(torch.int32) & 2**bits - 1
        values = (code.to(torch.float32) - (2**bits - 1) / 2) * step[:, None]
        delta[:, channels] = values if column_step is None else values * column_step
    return delta.to(dtype)


def add_delta_reference(
    weight: torch.Tensor,
    expert: DeltaLeaves | None,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    bias_out: torch.Tensor | None = None,
) -> None:
    """Write a weight plus a delta into ``out``; added in float32 and rounded once.

    Args:
        weight: ``[out, in]``, float32, bfloat16 or float16.
        expert: the delta; `None` for the base alone.
        out: ``[out, in]`` of the dtype of ``weight``, which it may be.
        bias: ``[out]`` of that dtype, the base's; zero if `None`.
        bias_out: ``[out]`` of that dtype, which ``bias`` may be: gets the bias with the expert's difference.

    >>> codes = torch.tensor([[0b1100]], dtype=torch.uint8)  # the two codes 0 and 3
    >>> weight = torch.tensor([[10.0, 20.0]])
    >>> add_delta_reference(weight, DeltaLeaves(codes, torch.tensor([2.0]), bits=2), out=weight)
    >>> weight
    tensor([[ 7., 23.]])
    """
    if expert is None:
        out.copy_(weight)
    else:
        delta = dequantize_delta_reference(
            expert.codes,
            expert.step,
            expert.bits,
            weight.shape[1],
            salient_index=expert.salient_index,
            salient=expert.salient,
            column_step=expert.column_step,
        )
        out.copy_(weight.float() + delta)
    if bias_out is not None:
        total = torch.zeros(bias_out.shape, device=bias_out.device) if bias is None else bias.float()
        bias_out.copy_(total if expert is None or expert.bias is None else total + expert.bias)


def delta_linear_reference(
    x: torch.Tensor,
    base_out: torch.Tensor | None,
    experts: Sequence[DeltaLeaves | None],
    expert_index: torch.Tensor,
    *,
    out_features: int,
) -> torch.Tensor:
    """Add to each row of a linear's output what its expert's delta makes of its input, in float32.

    Each delta that some row asks for is made dense once; one at a time, so that no two are held.

    Args:
        x: ``[rows, in]``, float32, bfloat16 or float16.
        base_out: ``[rows, out]`` of the dtype of ``x``, the base's output; zero if `None`.
        experts: the delta by slot, `None` for an empty slot.
        expert_index: int32 or int64 ``[rows]``, the slot of each row's expert; negative for the base alone.
        out_features: output channels.

    Returns:
        ``[rows, out]`` of the dtype of ``x``.

    >>> codes = torch.tensor([[0b1100]], dtype=torch.uint8)  # the two codes 0 and 3
    >>> expert = DeltaLeaves(codes, torch.tensor([2.0]), bits=2)
    >>> x, base_out = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[10.0], [20.0]])
    >>> delta_linear_reference(x, base_out, [expert], torch.tensor([-1, 0]), out_features=1)
    tensor([[10.],
            [23.]])
    """
    rows, in_features = x.shape
    y = torch.zeros(rows, out_features, device=x.device)
    if base_out is not None:
        y += base_out
    for slot in sorted({slot for slot in expert_index.tolist() if slot >= 0}):
        expert = experts[slot]
        if expert is None:
            continue
        delta = dequantize_delta_reference(
            expert.codes,
            expert.step,
            expert.bits,
            in_features,
            salient_index=expert.salient_index,
            salient=expert.salient,
            column_step=expert.column_step,
        )
        chosen = (expert_index == slot).nonzero()[:, 0]
        part = x[chosen].float() @ delta.T
        y.index_add_(0, chosen, part if expert.bias is None else part + expert.bias)
    return y.to(x.dtype)
