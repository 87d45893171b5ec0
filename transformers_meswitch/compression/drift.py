"""What a linear can make up for of the errors of everything compressed before it.

Each linear fitted to its own inputs is near its best, and yet the errors of a model's layers add up, several times
over since they agree in direction. Here a linear is fitted to what it is given in the model that is being made: its
inputs ``x̃`` there differ from the expert's ``x`` by what was lost so far, as does the residual stream ``r̃`` that its
output is added to. Its delta is to bring stream and output back to the expert's: with the expert's weight ``W`` and
the base's ``B``, the least squares of ``(B + T) x̃ + r̃ - W x - r`` over ``T`` is

    T = W - B + (W D + R) C⁻¹,   C = E[x̃ x̃ᵀ],  D = E[(x - x̃) x̃ᵀ],  R = E[(r - r̃) x̃ᵀ]

and quantising ``T`` under ``C`` is then as without drift. Corrections of the inputs are GPTAQ's (arXiv 2504.02692) and
QEP's (arXiv 2504.09629); without ``R``, outputs are brought back to what they were instead of the sum that the next
layer sees, and the model ends farther from the expert than without any correction (``docs/quality.md``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Drift", "corrected_delta"]

#: Share of its mean that is added to the diagonal of ``C``.
_DAMPING = 0.01
#: The same, times channels per token, where that is more: what few tokens say of many channels is not to be trusted.
_DAMPING_OF_FEW = 0.1


@dataclass(frozen=True)
class Drift:
    """How far a linear's inputs are from the expert's.

    Attributes:
        tokens: how many the means are over.
        inputs: float32 ``[in, in]``, ``D = E[(x - x̃) x̃ᵀ]``.
        residual: float32 ``[out, in]``, ``R = E[(r - r̃) x̃ᵀ]``; `None` where the output is not added to the stream.
    """

    tokens: int
    inputs: Tensor
    residual: Tensor | None = None


def corrected_delta(delta: Tensor, weight: Tensor, second_moment: Tensor, drift: Drift) -> Tensor:
    """The weight delta that brings a linear's output back to the expert's, drift of its inputs included.

    Args:
        delta: float32 ``[out, in]``, expert less base.
        weight: floating ``[out, in]``, the expert's.
        second_moment: float32 ``[in, in]``, ``E[x̃ x̃ᵀ]`` of the inputs as they are.
        drift: of these inputs.

    Returns:
        float32 ``[out, in]``; ``delta`` itself where the inputs are all zero, or so large that they overflow, which
        whoever fits to them refuses.

    >>> shrunk = torch.tensor([[0.25]])  # inputs x̃ = x/2 with E[x²] = 1: the weight has to be doubled
    >>> corrected = corrected_delta(torch.tensor([[1.0]]), torch.tensor([[3.0]]), shrunk, Drift(1000, shrunk))
    >>> round(corrected.item(), 1)  # less what the damping keeps
    4.0
    """
    mean = second_moment.diagonal().mean()
    if not 0 < float(mean) < torch.inf:
        return delta
    damped = second_moment.clone()
    damped.diagonal().add_(mean * max(_DAMPING, _DAMPING_OF_FEW * len(second_moment) / drift.tokens))
    owed = weight.float() @ drift.inputs
    if drift.residual is not None:
        owed += drift.residual
    return delta + torch.cholesky_solve(owed.T, torch.linalg.cholesky(damped)).T
