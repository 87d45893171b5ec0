"""Which part of the delta format each module of a model belongs to. Pure: looks at modules, changes nothing."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModelError

__all__ = ["is_conv1d", "is_linear", "linear_sizes", "module_kinds"]

#: Quantised linears are recognised by name, so that bitsandbytes stays an optional dependency.
_QUANTISED_LINEARS = ("Linear4bit", "Linear8bitLt")


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is GPT-2's ``Conv1D``, whose weight is ``[in, out]``."""
    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes ``x Wᵀ + b``: ``nn.Linear``, a bitsandbytes linear, or ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or type(module).__name__ in _QUANTISED_LINEARS


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)``; never read off the weight, which bitsandbytes packs."""
    if is_conv1d(module):
        in_features, out_features = module.weight.shape  # type: ignore[misc]
        return int(out_features), int(in_features)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def module_kinds(model: PreTrainedModel) -> dict[str, str]:
    """Kind (``"linear"``, ``"rows"`` or ``"values"``) of every module that owns parameters.

    Embeddings and the output head are stored as rows, since added tokens resize them; linears as codes; any other
    module without submodules (a norm) as values.

    Args:
        model: a causal LM, on any device, ``meta`` included.

    Raises:
        UnsupportedModelError: a layer with parameters that the format has no place for, named.
    """
    head = model.get_output_embeddings()
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            continue
        fused = next((p for p, t in parameters.items() if t.ndim > 2), None)
        if fused is not None and isinstance(module, nn.modules.conv._ConvNd):
            raise UnsupportedModelError(
                f"{name}.{fused} of {type(model).__name__} is a convolution's weight "
                f"({tuple(parameters[fused].shape)}), as vision and audio towers have. Deltas cover linear layers, "
                "embeddings and norms of text models; multimodal models are not supported."
            )
        if fused is not None:
            raise UnsupportedModelError(
                f"{name}.{fused} of {type(model).__name__} is a fused weight of {parameters[fused].ndim} dimensions "
                f"({tuple(parameters[fused].shape)}), as mixture-of-experts layers have. Deltas cover linear layers, "
                "embeddings and norms; models with fused experts are not supported."
            )
        if isinstance(module, nn.Embedding) or module is head:
            kinds[name] = "rows"
        elif is_linear(module):
            kinds[name] = "linear"
        elif next(module.children(), None) is None:
            kinds[name] = "values"
        else:
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} ({type(module).__name__}) has parameters {sorted(parameters)} of "
                "its own beside submodules; the delta format has no place for them."
            )
    return kinds
