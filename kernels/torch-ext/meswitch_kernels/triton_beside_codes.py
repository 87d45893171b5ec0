"""What an expert's delta has beside codes: steps, a bias difference and salient channels. Importing this needs Triton.

The functions are Triton's and are inlined. ``beside`` are the pointers to the steps, the bias difference's address or
zero, the number of salient channels, and the pointers to their indices and columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_dot import dot

__all__ = ["beside_row", "plus_beside"]

_BLOCK_SALIENT = tl.constexpr(16)


@triton.jit
def _load_bias(address, n, n_mask):
    """The bias difference of some output channels, or zero: float32 ``[BLOCK_OUT]``."""
    bias = tl.zeros(n.shape, tl.float32)
    if address != 0:
        bias = tl.load(address.to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)
    return bias


@triton.jit
def _load_salient(salient_index, salient, salient_channels, first, n, n_mask):
    """Some salient channels from ``first`` on, and which exist, ``[_BLOCK_SALIENT]``; and their columns."""
    k = first + tl.arange(0, _BLOCK_SALIENT)
    k_mask = k < salient_channels
    channel = tl.load(salient_index + k, mask=k_mask, other=0)
    where = salient + n.to(tl.int64)[:, None] * salient_channels + k[None, :]
    return channel, k_mask, tl.load(where, mask=n_mask[:, None] & k_mask[None, :], other=0.0)


@triton.jit
def beside_row(x_row, beside, n, n_mask):
    """Steps, and the bias difference plus salient channels times ``x_row``, of one row: float32 ``[BLOCK_OUT]``.

    To be called when the first codes have been asked for. It takes loads that wait for others; in the end, when no
    codes are on their way, there would be nothing to hide that.
    """
    step, bias, salient_channels, salient_index, salient = beside
    steps = tl.load(step + n, mask=n_mask, other=0.0)
    products = tl.zeros((n.shape[0], _BLOCK_SALIENT), tl.float32)
    for first in range(0, salient_channels, _BLOCK_SALIENT):
        channel, k_mask, kept = _load_salient(salient_index, salient, salient_channels, first, n, n_mask)
        xs = tl.load(x_row + channel, mask=k_mask, other=0.0).to(tl.float32)
        products += kept.to(tl.float32) * xs[None, :]
    return steps, _load_bias(bias, n, n_mask) + tl.sum(products, axis=1)


@triton.jit
def plus_beside(levels, x_rows, beside, n, n_mask):
    """``levels`` ``[BLOCK_ROWS, BLOCK_OUT]`` times steps, and the same of several rows, by pointers ``[BLOCK_ROWS]``.

    In the end, as of several rows there are no registers left to keep it in.
    """
    step, bias, salient_channels, salient_index, salient = beside
    steps = tl.load(step + n, mask=n_mask, other=0.0)
    delta = levels * steps[None, :] + _load_bias(bias, n, n_mask)[None, :]
    for first in range(0, salient_channels, _BLOCK_SALIENT):
        channel, k_mask, kept = _load_salient(salient_index, salient, salient_channels, first, n, n_mask)
        xs = tl.load(x_rows[:, None] + channel[None, :], mask=k_mask[None, :], other=0.0)
        if xs.dtype == tl.bfloat16:
            delta = dot(xs, kept.trans(), delta)
        else:
            delta = dot(xs.to(tl.float32), kept.to(tl.float32).trans(), delta)
    return delta
