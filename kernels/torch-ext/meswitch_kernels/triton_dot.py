"""The matrix product, which the interpreter cannot do in bfloat16. Importing this module needs Triton."""

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = ["dot"]

# Triton chooses by the same variable, when a kernel is defined.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, total):
    """``total + a @ b`` in float32; products of 32-bit floats are not rounded to fewer bits."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
