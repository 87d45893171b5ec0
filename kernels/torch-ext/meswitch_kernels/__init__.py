"""Triton kernels for ME-Switch deltas, and the same arithmetic in plain torch.

Imports without Triton and without an accelerator. This folder is the source of a Hub kernel repository, so it uses
nothing but torch and Triton.
"""

from .op import dequantize_delta, has_kernel
from .reference import dequantize_delta_reference
from .rounding import round_in_turn, round_in_turn_reference

__all__ = [
    "dequantize_delta",
    "dequantize_delta_reference",
    "has_kernel",
    "round_in_turn",
    "round_in_turn_reference",
]
