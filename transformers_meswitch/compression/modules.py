"""One module of a base and of an expert, to its record and tensors in the delta format; shared by all producers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..configuration import MESwitchConfig
from ..delta_format.spec import LinearRecord, ModuleRecord, ValuesRecord
from ..errors import CompressionError
from .differences import Difference, differs
from .drift import Drift, corrected_delta
from .finite import all_finite
from .linear import compress_linear
from .rows import compress_rows

__all__ = ["check_shapes", "compress_module", "weight_difference"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compress_module(
    kind: str,
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    *,
    name: str,
    config: MESwitchConfig,
    second_moment: Tensor | None = None,
    drift: Drift | None = None,
    is_conv1d: bool = False,
    exact_rows: bool = False,
) -> tuple[ModuleRecord, dict[str, Tensor]] | None:
    """The difference of one module.

    Args:
        kind: ``"linear"``, ``"rows"`` or ``"values"``, see :func:`transformers_meswitch.module_kinds.module_kinds`.
        base: the base's parameters by their name in the module (``weight``, ``bias``), floating.
        expert: the expert's, floating; may be of another dtype than the base's.
        name: canonical module name, for ``config.layer_bits`` and for messages.
        config: bits, salient channels and column steps.
        second_moment: of the inputs of a linear or an output head, see :func:`~.linear.compress_linear`.
        drift: of a linear's inputs, which the delta is to make up for; with the whole second moment.
        is_conv1d: whether a linear's weight is a GPT-2 ``Conv1D``'s ``[in, out]``.
        exact_rows: whether rows stay exact whatever ``config.embedding_bits`` says.

    Returns:
        The record and its leaves by name, or `None` where the expert's module equals the base's.

    Raises:
        CompressionError: parameters that differ in name or shape, are not finite, or are not floating.

    >>> one = {"weight": torch.ones(3)}
    >>> compress_module("values", one, {"weight": 2 * one["weight"]}, name="norm", config=MESwitchConfig())
    (ValuesRecord(shapes={'weight': (3,)}, kind='values'), {'values.weight': tensor([2., 2., 2.])})
    >>> compress_module("values", one, one, name="norm", config=MESwitchConfig()) is None
    True
    """
    check_shapes(kind, _shapes(base), _shapes(expert), name)
    _check_dtypes(base, expert, name)
    expert = {key: value.float() if value.dtype == torch.float64 else value for key, value in expert.items()}
    if kind == "linear":
        # Of the weights, a delta that is not finite tells, without another pass over them.
        ours, theirs = ({key: value for key, value in of.items() if key != "weight"} for of in (expert, base))
        _check_finite(theirs, ours, name)
        return _compress_linear(base, expert, name, config, second_moment, drift, is_conv1d)
    _check_finite(base, expert, name)
    if kind == "rows":
        bits = None if exact_rows else config.row_bits_of(name)
        try:
            return compress_rows(
                base, expert, bits=bits, salient_channels=config.salient_channels, second_moment=second_moment
            )
        except CompressionError as error:
            raise CompressionError(f"{name}: {error}") from error
    changed = {key: value.contiguous() for key, value in expert.items() if differs(base[key], value)}
    if not changed:
        return None
    shapes = {key: tuple(value.shape) for key, value in changed.items()}
    return ValuesRecord(shapes), {f"values.{key}": value for key, value in changed.items()}


def check_shapes(
    kind: str, base: Mapping[str, tuple[int, ...]], expert: Mapping[str, tuple[int, ...]], name: str
) -> None:
    """Refuse a module that has other parameters in the expert than in the base.

    Args:
        kind: as for :func:`compress_module`; the first size of ``"rows"`` is free, since added tokens change it.
        base: parameter name to shape in the base.
        expert: parameter name to shape in the expert.
        name: canonical module name, for the message.

    Raises:
        CompressionError: naming the parameter and both shapes.

    >>> check_shapes("rows", {"weight": (10, 4)}, {"weight": (12, 4)}, "embed")
    """
    if set(base) != set(expert):
        raise CompressionError(
            f"{name} has parameters {sorted(expert)} in the expert but {sorted(base)} in the base. "
            "The expert is of another architecture; a delta needs a fine-tune of this base."
        )
    fixed = 1 if kind == "rows" else 0
    for key in expert:
        if base[key][fixed:] != expert[key][fixed:]:
            raise CompressionError(
                f"{name}.{key} has shape {expert[key]} in the expert but {base[key]} in the base. "
                "The expert is of another architecture or size; a delta needs a fine-tune of this base."
            )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _check_dtypes(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], name: str) -> None:
    for whose, tensors in (("base", base), ("expert", expert)):
        for key, tensor in tensors.items():
            if tensor.dtype not in _FLOATS:
                raise CompressionError(
                    f"{name}.{key} of the {whose} is {tensor.dtype}, expected one of {_FLOATS}. "
                    "Quantised checkpoints cannot be compressed; use the checkpoint before quantisation."
                )


def _check_finite(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], name: str) -> None:
    for whose, tensors in (("base", base), ("expert", expert)):
        for key, tensor in tensors.items():
            if not all_finite(tensor):
                raise CompressionError(
                    f"{name}.{key} of the {whose} holds NaN or infinite values; compress an intact checkpoint."
                )


def weight_difference(base: Tensor, expert: Tensor, is_conv1d: bool = False) -> Difference:
    """What a fine-tune changed of a linear's weight, ``[out, in]`` on the expert's device.

    Args:
        base: ``[out, in]``, or ``[in, out]`` of a GPT-2 ``Conv1D``; floating.
        expert: of the same shape.
        is_conv1d: whether it is a ``Conv1D``'s.

    >>> weight_difference(torch.ones(2, 1), torch.tensor([[1.0], [3.0]]), is_conv1d=True).whole().tolist()
    [[0.0, 2.0]]
    """
    base = base.to(expert.device)
    return Difference(base.T, expert.T) if is_conv1d else Difference(base, expert)


def _target(
    delta: Difference, weight: Tensor, second_moment: Tensor | None, drift: Drift | None, is_conv1d: bool
) -> Tensor | Difference:
    """What is to be quantised."""
    if drift is None or second_moment is None:
        return delta
    return corrected_delta(delta.whole(), weight.T if is_conv1d else weight, second_moment, drift)


def _compress_linear(
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    name: str,
    config: MESwitchConfig,
    second_moment: Tensor | None,
    drift: Drift | None,
    is_conv1d: bool,
) -> tuple[LinearRecord, dict[str, Tensor]] | None:
    own_bias = "bias" in expert and differs(base["bias"], expert["bias"])
    delta = weight_difference(base["weight"], expert["weight"], is_conv1d)
    bits = config.bits_of(name)
    # As for all other parameters: a copy of the base in fewer bits differs by rounding alone, and is no change.
    if delta.is_zero():
        _check_finite(base, expert, name)
        if not own_bias:
            return None
        # The record must announce codes; all-zero ones say that only the bias changed.
        quantized = compress_linear(torch.zeros(delta.shape, device=delta.device), bits, 0)
    else:
        try:
            target = _target(delta, expert["weight"], second_moment, drift, is_conv1d)
            quantized = compress_linear(target, bits, config.salient_channels, second_moment, config.column_steps)
        except CompressionError as error:
            _check_finite(base, expert, name)
            raise CompressionError(f"{name}: {error}") from error
    record, tensors = quantized.record, dict(quantized.tensors)
    if own_bias:
        record = LinearRecord(
            record.out_features, record.in_features, bits, record.salient_channels, record.column_step, bias=True
        )
        tensors["bias"] = expert["bias"].contiguous()
    return record, tensors
