"""Several linears of the same input in one launch: which of them a block of output channels is of.

Pointers and sizes of the linears come as tuples, which Triton takes apart when it compiles. Importing this module
needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["blocks_of", "chosen", "linear_of_block"]


@triton.jit
def chosen(which, these):
    """One of a tuple of pointers, or of numbers, by a number that is known on the device only."""
    one = these[0]
    for other in tl.static_range(1, len(these)):
        one = tl.where(which == other, these[other], one)
    return one


@triton.jit
def blocks_of(out_features, BLOCK_OUT: tl.constexpr):
    """Blocks of output channels of all linears, none of which is of two."""
    blocks = tl.cdiv(out_features[0], BLOCK_OUT)
    for other in tl.static_range(1, len(out_features)):
        blocks += tl.cdiv(out_features[other], BLOCK_OUT)
    return blocks


@triton.jit
def linear_of_block(block, out_features, BLOCK_OUT: tl.constexpr):
    """The linear of a block of all of them, and the block's place in it."""
    which = block * 0
    first = block * 0
    end = block * 0
    for before in tl.static_range(len(out_features) - 1):
        end += tl.cdiv(out_features[before], BLOCK_OUT)
        which += (block >= end).to(tl.int32)
        first = tl.where(block >= end, end, first)
    return which, block - first
