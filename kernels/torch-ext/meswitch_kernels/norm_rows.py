"""Root-mean-square norms of a batch whose rows have different experts, as a torch operator."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

import torch

from .op import add_op_namespace_prefix, has_kernel

_norm_with_triton: Callable[..., None] | None = None
if importlib.util.find_spec("triton") is not None:
    from .triton_norm_rows import norm_rows_triton

    _norm_with_triton = norm_rows_triton

__all__ = ["NormForm", "norm_rows", "norm_rows_reference"]

#: How a norm applies its weight. ``"round_first"``: to what it has rounded, and rounds again (Llama).
#: ``"round_last"``: in float32, and rounds once (GPT-OSS, OLMo 2). ``"plus_one"``: so, too, with one added to the
#: weight (Gemma). Of float32 the first two are the same.
NormForm = Literal["round_first", "round_last", "plus_one"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The kernel holds a row in registers; wider rows are left to torch.
_MAX_WIDTH = 2**16


def norm_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    own_weights: torch.Tensor,
    has: torch.Tensor,
    expert_index: torch.Tensor,
    *,
    eps: float,
    form: NormForm,
) -> torch.Tensor:
    """``x / sqrt(mean(x ** 2) + eps)`` times the weight of each row's expert, or of the base where it has none.

    Root mean square layer normalization (arXiv 1910.07467, equation 4), over the last dimension. Sums and products
    are in float32. Nothing waits for the device and no shape depends on its data, so CUDA graphs capture it. There
    are no gradients.

    Args:
        x: ``[batch, ..., width]``, float32, bfloat16 or float16.
        weight: ``[width]`` of the same dtype, as all weights here: the base's.
        own_weights: ``[slots, width]``, the experts' by slot, of one slot or more.
        has: bool ``[slots]``, whether there is an expert's weight in the slot.
        expert_index: int32 ``[batch]``, the slot of each row's expert; negative for the base. One that there is not
            is not checked for.
        eps: what is added to the mean of squares.
        form: how the weight is applied.

    Returns:
        As ``x``, contiguous.

    Raises:
        ValueError: an unknown form, or shapes, dtypes or devices that do not fit together.

    >>> x, has = torch.tensor([[3.0, 3.0], [2.0, 2.0]]), torch.tensor([True])
    >>> weight, own_weights = torch.tensor([1.0, 1.0]), torch.tensor([[5.0, 6.0]])
    >>> index = torch.tensor([-1, 0], dtype=torch.int32)
    >>> norm_rows(x, weight, own_weights, has, index, eps=0.0, form="round_first").tolist()
    [[1.0, 1.0], [5.0, 6.0]]
    """
    if form not in get_args(NormForm):
        raise ValueError(f"form is {form!r}, expected one of {', '.join(get_args(NormForm))}.")
    if x.ndim < 2 or x.dtype not in _DTYPES:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, expected [batch, ..., width] of "
            f"{', '.join(map(str, _DTYPES))}."
        )
    slots = max(1, own_weights.shape[0]) if own_weights.ndim else 1
    for name, tensor, dtype, shape in (
        ("weight", weight, x.dtype, (x.shape[-1],)),
        ("own_weights", own_weights, x.dtype, (slots, x.shape[-1])),
        ("has", has, torch.bool, (slots,)),
        ("expert_index", expert_index, torch.int32, (x.shape[0],)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {dtype} of shape {shape}."
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}.")
    return _norm_rows(x, weight, own_weights, has, expert_index, eps, form)


@torch.library.custom_op(add_op_namespace_prefix("norm_rows"), mutates_args=())
def _norm_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    own_weights: torch.Tensor,
    has: torch.Tensor,
    expert_index: torch.Tensor,
    eps: float,
    form: str,
) -> torch.Tensor:
    width = x.shape[-1]
    if _norm_with_triton is None or not has_kernel(x.device) or width > _MAX_WIDTH:
        return norm_rows_reference(x, weight, own_weights, has, expert_index, eps=eps, form=form)
    y = x.new_empty(x.shape)
    if y.numel():
        # Triton launches on the current device, which need not be the tensors'.
        with torch.accelerator.device_index(x.device.index):
            _norm_with_triton(
                y.view(-1, width),
                x.contiguous().view(-1, width),
                weight.contiguous(),
                own_weights.contiguous(),
                has.contiguous(),
                expert_index.contiguous(),
                eps,
                form,
            )
    return y


@_norm_rows.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    own_weights: torch.Tensor,
    has: torch.Tensor,
    expert_index: torch.Tensor,
    eps: float,
    form: str,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def norm_rows_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    own_weights: torch.Tensor,
    has: torch.Tensor,
    expert_index: torch.Tensor,
    *,
    eps: float,
    form: str,
) -> torch.Tensor:
    """The same in plain torch; arguments and results as in :func:`norm_rows`.

    >>> x, has, index = torch.tensor([[2.0, 2.0]]), torch.tensor([True]), torch.tensor([0], dtype=torch.int32)
    >>> weight, own_weights = torch.zeros(2), torch.tensor([[5.0, 6.0]])
    >>> norm_rows_reference(x, weight, own_weights, has, index, eps=0.0, form="plus_one").tolist()
    [[6.0, 7.0]]
    """
    slot = expert_index.clamp(min=0).long()
    is_own = (expert_index >= 0) & has[slot]
    chosen = torch.where(is_own[:, None], own_weights[slot], weight)
    chosen = chosen.view(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1]).float()
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if form == "round_first":
        values = values.to(x.dtype).float()
    elif form == "plus_one":
        chosen = 1.0 + chosen
    return (values * chosen).to(x.dtype).contiguous()
