"""A linear's delta whose step sizes and salient columns are trained, while its codes stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..delta_format.spec import LinearRecord

__all__ = ["TRAINABLE", "Trainable", "TrainedDelta", "add_to_linears"]

#: ``"steps"``: the step sizes, of rows and, where there are any, of columns; ``"salient"``: the salient columns.
Trainable = Literal["steps", "salient"]
TRAINABLE: tuple[Trainable, ...] = ("steps", "salient")


class TrainedDelta(nn.Module):
    """What a layer adds for an expert, ``x Δ̂ᵀ``, with gradients for step sizes and salient columns.

    Trained are logarithms of factors on the steps, so that a step stays positive and one learning rate fits layers of
    all scales, and changes of the salient columns in units of each column's root mean square. At zero, where all of
    them begin, the delta is the stored one bit for bit; a row or column that is zero stays zero.

    Salient columns are rounded to bfloat16, as they are stored, in every forward pass; the gradient passes through.

    Args:
        record: the linear's record.
        leaves: its leaves by name, on one device; a ``bias`` among them is not trained.
        train: what to train.

    Attributes:
        record: the record.
        bias: the expert's own bias ``[out]``, for the layer that adds it; `None` if the record has none.
        log_step: float32 ``[out]``, logarithm of the factor on each row's step; `None` where it is not trained.
        log_column_step: float32 ``[coded]``, of that on each column's step; likewise.
        salient_shift: float32 ``[out, salient]``, change of the salient columns in units of each; likewise.

    >>> record = LinearRecord(out_features=1, in_features=2, bits=2)
    >>> delta = TrainedDelta(record, {"codes": torch.tensor([[0b1100]], dtype=torch.uint8), "step": torch.ones(1)})
    >>> delta(torch.tensor([[1.0, 2.0]])).sum().backward()  # levels -1.5 and 1.5
    >>> delta.log_step.grad
    tensor([1.5000])
    """

    codes: Tensor
    step: Tensor
    column_step: Tensor | None
    salient_index: Tensor | None
    salient: Tensor | None
    bias: Tensor | None
    _coded: Tensor | None
    _unit: Tensor | None

    def __init__(
        self, record: LinearRecord, leaves: Mapping[str, Tensor], train: Collection[Trainable] = TRAINABLE
    ) -> None:
        super().__init__()
        self.record = record
        for leaf in ("codes", "step", "column_step", "salient_index", "salient", "bias"):
            tensor = leaves.get(leaf)
            self.register_buffer(leaf, None if tensor is None else tensor.detach(), persistent=False)
        steps, columns = "steps" in train, "salient" in train
        self.log_step = _zeros_like(self.step if steps else None)
        self.log_column_step = _zeros_like(self.column_step if steps else None)
        self.salient_shift = _zeros_like(self.salient if columns else None)
        coded = unit = None
        if self.log_column_step is not None:
            # Worked out once: finding what is not salient makes an accelerator wait for the host.
            coded = torch.ones(record.in_features, dtype=torch.bool, device=self.codes.device)
            if self.salient_index is not None:
                coded[self.salient_index.long()] = False
            coded = coded.nonzero().squeeze(1)
        if self.salient is not None:
            unit = self.salient.float().square().mean(dim=0).sqrt()
        self.register_buffer("_coded", coded, persistent=False)
        self.register_buffer("_unit", unit, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of ``x``; the bias is the caller's business."""
        return _Product.apply(x, self.record, self.codes, self._coded, self.salient_index, *self._values())

    def leaves(self) -> dict[str, Tensor]:
        """The leaves that stand for the delta as it is trained by now, in the dtypes of the delta format."""
        step, column_step, salient = (None if value is None else value.detach() for value in self._values())
        found = {
            "codes": self.codes,
            "step": step,
            "column_step": column_step,
            "salient_index": self.salient_index,
            "salient": None if salient is None else salient.to(torch.bfloat16),
            "bias": self.bias,
        }
        return {leaf: tensor for leaf, tensor in found.items() if tensor is not None}

    def _values(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Row steps, column steps and salient columns in float32, with gradients where they are trained."""
        step, column_step = self.step, self.column_step
        salient = None if self.salient is None else self.salient.float()
        if self.log_step is not None:
            step = step * self.log_step.exp()
        if self.log_column_step is not None and column_step is not None:
            column_step = column_step * self.log_column_step.exp()
        if self.salient_shift is not None and salient is not None and self._unit is not None:
            salient = salient + self.salient_shift * self._unit
        return step, column_step, salient


def _zeros_like(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(torch.zeros_like(tensor, dtype=torch.float32))


class _Product(torch.autograd.Function):
    """``x Δ̂ᵀ``. The dense delta is worked out again for the gradient, so that of a layer only the codes are kept.

    With ``P = gᵀ x`` ``[out, in]`` for the gradient ``g`` of the output, and ``Δ̂_ij = step_i column_j level_ij``:
    the gradient of ``step_i`` is ``Σ_j P_ij column_j level_ij``, that of ``column_j`` is ``Σ_i P_ij step_i level_ij``,
    and that of a salient column is the column of ``P``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        record: LinearRecord,
        codes: Tensor,
        coded: Tensor | None,
        salient_index: Tensor | None,
        step: Tensor,
        column_step: Tensor | None,
        salient: Tensor | None,
    ) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(x, codes, coded, salient_index, step, column_step, salient)
        return nn.functional.linear(x, _dense(record, x.dtype, codes, step, column_step, salient_index, salient))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, coded, salient_index, step, column_step, salient = ctx.saved_tensors
        of_x = of_step = of_column = of_salient = None
        if ctx.needs_input_grad[0]:
            dense = _dense(ctx.record, gradient.dtype, codes, step, column_step, salient_index, salient)
            of_x = gradient @ dense
            del dense
        wanted = ctx.needs_input_grad[5:]
        if any(wanted):
            product = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()
            # The salient columns have no level: they are zero in the sums over levels.
            nothing = None if salient is None else torch.zeros_like(salient)
            if wanted[0]:
                unit = torch.ones_like(step)
                levels = _dense(ctx.record, torch.float32, codes, unit, column_step, salient_index, nothing)
                of_step = levels.mul_(product).sum(dim=1)
            if wanted[1]:
                levels = _dense(ctx.record, torch.float32, codes, step, None, salient_index, nothing)
                of_column = levels.mul_(product).sum(dim=0)[coded]
            if wanted[2]:
                of_salient = product[:, salient_index.long()]
        return of_x, None, None, None, None, of_step, of_column, of_salient


def _dense(
    record: LinearRecord,
    dtype: torch.dtype,
    codes: Tensor,
    step: Tensor,
    column_step: Tensor | None,
    salient_index: Tensor | None,
    salient: Tensor | None,
) -> Tensor:
    """The dense delta ``[out, in]`` in ``dtype``, exactly as layers that load what is stored work it out."""
    leaves = {"codes": codes, "step": step}
    if column_step is not None:
        leaves["column_step"] = column_step
    if salient is not None and salient_index is not None:
        leaves |= {"salient_index": salient_index, "salient": salient.to(torch.bfloat16)}
    return ops.dequantize_delta(record, leaves, dtype)


def add_to_linears(model: nn.Module, deltas: Mapping[str, TrainedDelta]) -> list[torch.utils.hooks.RemovableHandle]:
    """Let the linears of a plain model, which hold the base's weights, add their deltas; for models without experts.

    Args:
        model: the model, changed in place.
        deltas: linear's name to its delta.

    Returns:
        What takes each off again with ``remove()``.
    """

    def added(delta: TrainedDelta) -> Any:
        return lambda _, inputs, output: output + delta(inputs[0])

    return [model.get_submodule(name).register_forward_hook(added(delta)) for name, delta in deltas.items()]
