"""How the papers count: arithmetic on parameters, not files. Compared with, never claimed as measured."""

from __future__ import annotations

from transformers import PreTrainedModel

from transformers_meswitch.module_kinds import linear_sizes, module_kinds

#: 16 bit.
_DENSE_ITEM = 2
_SCALAR = 2


def parameter_count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _linears(model: PreTrainedModel) -> list[int]:
    """Weights of each linear, embedding and output head excluded."""
    kinds = module_kinds(model)
    sizes = [linear_sizes(model.get_submodule(name)) for name, kind in kinds.items() if kind == "linear"]
    return [out_features * in_features for out_features, in_features in sizes]


def dense_bytes(model: PreTrainedModel) -> int:
    """A full copy: 2 bytes a parameter."""
    return _DENSE_ITEM * parameter_count(model)


def paper_delta(model: PreTrainedModel, bits: int = 2) -> int:
    """ME-Switch (arXiv 2406.09041): linears at ``bits`` a weight, all else in 16 bit.

    Step sizes, salient channels and indices count nothing: this is the arithmetic that gives the published ratios.
    """
    linear = sum(_linears(model))
    return linear * bits // 8 + _DENSE_ITEM * (parameter_count(model) - linear)


def bitdelta_delta(model: PreTrainedModel) -> int:
    """BitDelta (arXiv 2402.10193): linears at 1 bit a weight and one 16-bit scalar a matrix, all else in 16 bit."""
    linears = _linears(model)
    return sum(linears) // 8 + _SCALAR * len(linears) + _DENSE_ITEM * (parameter_count(model) - sum(linears))
