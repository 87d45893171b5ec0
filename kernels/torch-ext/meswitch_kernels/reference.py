"""The kernels' arithmetic in plain torch: what they are tested against, and what runs where Triton does not."""

from __future__ import annotations

import torch

__all__ = ["dequantize_delta_reference"]


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
