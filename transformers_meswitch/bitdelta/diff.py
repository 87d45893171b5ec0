"""What a BitDelta diff says of which module, checked against the base.

A diff is what BitDelta's ``save_diff`` writes: for each linear that is compressed

* ``<module>.mask``, int32 ``[in / 32, out]``: bit ``k`` (of value ``2^k``, the sign bit being the 32nd) of
  ``mask[i, j]`` says whether weight ``[j, 32 i + k]`` of the delta is positive (1) or negative (0), and
* ``<module>.coeff``, a scalar: the size of all its elements;

and whole, by its full name, every other parameter of the fine-tune. ``load_diff`` adds ``±coeff``, rounded to the
weight's dtype, to the weights that have a mask, and replaces those that are there whole, cast to the base's dtype.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compression.differences import differs
from ..compression.sources import CheckpointParameters, input_embedding, output_head
from ..delta_format.tensor_files import TORCH_DTYPES
from ..errors import BitDeltaError, UnsupportedModelError
from ..module_kinds import is_conv1d, module_kinds

__all__ = ["Diff", "Signs", "sort_diff"]

#: Signs in an element of a mask.
_SIGNS = 32
_MASK, _COEFF = ".mask", ".coeff"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Signs:
    """The delta of a linear: ``±coeff``.

    Attributes:
        mask: int32 ``[in / 32, out]``.
        coeff: what is added where the bit is set, rounded to the dtype of the base's weight; finite, of any sign.
    """

    mask: Tensor
    coeff: float


@dataclass(frozen=True)
class Diff:
    """A diff that fits its base.

    Attributes:
        signs: canonical module name to the delta of a linear.
        parameters: full name to the fine-tune's own value, floating, in the dtype of the file; of embeddings, output
            head and modules such as norms.
        tied: whether the output head is the input embedding.
    """

    signs: dict[str, Signs]
    parameters: dict[str, Tensor]
    tied: bool


def sort_diff(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], base: CheckpointParameters, model: PreTrainedModel
) -> Diff:
    """Find the module of each tensor, and make sure that it fits.

    Args:
        tensors: what the file holds.
        path: the file, for messages.
        base: the base's parameters.
        model: the base's causal LM, on any device, ``meta`` included; only its structure is used.

    Raises:
        BitDeltaError: a name that the base has not, a shape or a dtype that does not fit, a mask without coefficient
            or the other way round, a coefficient that is not finite, a module that is there twice, a parameter
            that ``load_diff`` would not put where it belongs; or no mask at all.
        UnsupportedModelError: a linear that is stored whole, or GPT-2's; a layer that deltas cannot express.
    """
    return _Sorting(tensors, os.fspath(path), base, model).sort()


class _Sorting:
    def __init__(
        self, tensors: Mapping[str, Tensor], path: str, base: CheckpointParameters, model: PreTrainedModel
    ) -> None:
        self._tensors, self._path, self._base, self._model = tensors, path, base, model
        self._kinds = module_kinds(model)
        self._embedding, self._head = input_embedding(model), output_head(model)
        self._owners = {f"{module}.{key}": (module, key) for module in base.modules for key in base.shapes(module)}

    def sort(self) -> Diff:
        signs: dict[str, Signs] = {}
        parameters: dict[str, Tensor] = {}
        for name, tensor in self._tensors.items():
            if name.endswith(_MASK):
                signs[name.removesuffix(_MASK)] = self._signs(name.removesuffix(_MASK))
            elif name.endswith(_COEFF):
                if name.removesuffix(_COEFF) + _MASK not in self._tensors:
                    raise self._error(f"{name!r} has no {name.removesuffix(_COEFF) + _MASK!r} beside it")
            elif self._is_taken(name, tensor):
                parameters[name] = tensor
        if not signs:
            raise self._error(
                f"it has no mask of a linear ({len(self._tensors)} tensors, expected names such as "
                f"{next(name for name, kind in self._kinds.items() if kind == 'linear')}{_MASK})"
            )
        return Diff(signs, parameters, self._tied(parameters))

    def _error(self, problem: str) -> BitDeltaError:
        return BitDeltaError(
            f"{self._path} is no BitDelta diff of {self._base.checkpoint.repo}: {problem}. Give the base that the "
            "fine-tune was trained from and the diff as it was published; download a damaged file again."
        )

    def _unknown(self, name: str, known: Mapping[str, object]) -> BitDeltaError:
        close = difflib.get_close_matches(name, known, n=1)
        return self._error(
            f"it holds {name!r}, which the base has not{f'; the closest is {close[0]}' if close else ''}"
        )

    def _signs(self, module: str) -> Signs:
        mask, coeff = self._tensors[module + _MASK], self._tensors.get(module + _COEFF)
        if module not in self._kinds:
            raise self._unknown(module + _MASK, {name + _MASK: None for name in self._kinds})
        if self._kinds[module] != "linear":
            raise self._error(f"{module}{_MASK} is of a module that is not a linear layer, which alone have masks")
        if is_conv1d(self._model.get_submodule(module)):
            raise UnsupportedModelError(
                f"{self._path} holds {module}{_MASK}, and {module} is a Conv1D, whose weight is transposed; BitDelta "
                "has no such models. Compress the fine-tune itself with meswitch compress."
            )
        if module + ".weight" in self._tensors:
            raise self._error(f"{module} has both a mask and a whole weight, expected one of them")
        out_features, in_features = self._base.shapes(module)["weight"]
        if in_features % _SIGNS:
            raise self._error(f"{module} has {in_features} inputs, and masks hold {_SIGNS} signs an element")
        if mask.dtype != torch.int32 or tuple(mask.shape) != (in_features // _SIGNS, out_features):
            raise self._error(
                f"{module}{_MASK} is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.int32 of shape "
                f"{(in_features // _SIGNS, out_features)} for {in_features} inputs and {out_features} outputs"
            )
        if coeff is None:
            raise self._error(f"{module}{_MASK} has no {module}{_COEFF} beside it")
        if coeff.dtype not in _FLOATS or coeff.ndim:
            raise self._error(
                f"{module}{_COEFF} is {coeff.dtype} of shape {tuple(coeff.shape)}, expected one floating number"
            )
        rounded = coeff.to(self._dtype(module))
        # The step is twice as large, and must be finite in float32 too.
        if not bool((2 * rounded.float()).isfinite()):
            raise self._error(f"{module}{_COEFF} is {coeff.item()}, in {rounded.dtype} not a finite step")
        return Signs(mask, rounded.item())

    def _dtype(self, module: str) -> torch.dtype:
        stored = self._base.checkpoint.dtype(self._base.stored_name(f"{module}.weight"))
        dtype = TORCH_DTYPES.get(stored)
        if dtype not in _FLOATS:
            raise BitDeltaError(
                f"{module}.weight of {self._base.checkpoint.repo} is of dtype {stored}, expected one of {_FLOATS}. "
                "Give the checkpoint before quantisation."
            )
        return dtype

    def _is_taken(self, name: str, tensor: Tensor) -> bool:
        """Whether the parameter is one that deltas keep as it is; `False` if it may be left out, being the base's."""
        if name not in self._owners:
            raise self._unknown(name, self._owners)
        module, key = self._owners[name]
        expected = self._base.shapes(module)[key]
        free = 1 if module in (self._embedding, self._head) else 0  # added tokens
        fits = tuple(tensor.shape[free:]) == expected[free:] and tensor.ndim == len(expected) and tensor.numel()
        if tensor.dtype not in _FLOATS or not fits:
            sizes = ", ".join(["any", *map(str, expected[1:])] if free else map(str, expected))
            raise self._error(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected a floating one of ({sizes})"
            )
        if key == "weight" and self._kinds[module] != "linear":
            return True
        own = self._base.of(module)[key]
        if tensor.shape == own.shape and not differs(own, tensor.to(own.dtype)):
            return False
        if key == "weight":
            raise UnsupportedModelError(
                f"{self._path} holds {name} whole, and it differs from the base's; deltas have no place for the exact "
                "weight of a linear layer. Compress the fine-tune itself with meswitch compress."
            )
        raise self._error(f"{name} differs from the base's, and BitDelta's own load_diff puts weights in place only")

    def _tied(self, parameters: Mapping[str, Tensor]) -> bool:
        embedding = f"{self._embedding}.weight"
        rows = {
            name: parameters[name].shape[0] if name in parameters else self._base.shapes(module)["weight"][0]
            for module, name in ((self._embedding, embedding), (self._head, f"{self._head}.weight"))
            if module is not None
        }
        head = parameters.get(f"{self._head}.weight")
        if (not self._base.tied or head is not None) and len(set(rows.values())) > 1:
            sizes = " and ".join(f"{name} {count}" for name, count in rows.items())
            raise self._error(f"{sizes} rows, expected as many of one as of the other")
        if not self._base.tied:
            return False
        other = parameters[embedding] if embedding in parameters else self._base.of(self._embedding)["weight"]
        return head is None or torch.equal(head.to(other.dtype), other)
