"""What a method of delta compression is given and gives back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_meswitch.module_kinds import module_kinds

__all__ = ["Compressed", "Inputs", "Method", "linear_names", "merged_weights", "rest_bytes"]

State = Mapping[str, Tensor]


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linears whose deltas are compressed: all but the output head, as everywhere in this package.

    They are in the order of the model.
    """
    return [name for name, kind in module_kinds(model).items() if kind == "linear"]


@dataclass
class Inputs:
    """One expert, its base, and calibration of it, all on one device.

    Attributes:
        model: a causal LM of their architecture, in evaluation mode; methods that need to run it put in weights of
            their own and leave it with any.
        base: the base's parameters by name, bfloat16.
        expert: the expert's, bfloat16.
        moments: linear's name to float32 ``[in, in]``, ``E[x xᵀ]`` of its inputs over the calibration sequences.
        sequences: those sequences: token ids, and how many of them are the prompt's.
        seed: of what a method draws.
        distillation_steps: optimiser steps of the methods that train.
        base_folder: the base's checkpoint, for methods that work on folders.
        texts: the sequences as text, for the same.
    """

    model: PreTrainedModel
    base: State
    expert: State
    moments: Mapping[str, Tensor]
    sequences: Sequence[tuple[list[int], int]]
    seed: int = 0
    distillation_steps: int = 200
    base_folder: Path | None = None
    texts: Sequence[str] = ()
    _shared: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def linears(self) -> list[str]:
        """Names of the linears."""
        return linear_names(self.model)

    def delta(self, name: str) -> Tensor:
        """A linear's delta: float32 ``[out, in]``."""
        return self.expert[f"{name}.weight"].float() - self.base[f"{name}.weight"].float()

    def shared(self, key: str, make: Callable[[], Any]) -> Any:
        """Something that several methods need, made once; see :meth:`shared_seconds`."""
        if key not in self._shared:
            started = time.perf_counter()
            value = make()
            synchronize()
            self._shared[key] = (value, time.perf_counter() - started)
        return self._shared[key][0]

    def shared_keys(self) -> list[str]:
        """What :meth:`shared` has made."""
        return list(self._shared)

    def shared_seconds(self, key: str) -> float:
        """How long :meth:`shared` took to make it; 0 before."""
        return self._shared.get(key, (None, 0.0))[1]


@dataclass
class Compressed:
    """What a method made of an expert.

    Attributes:
        deltas: linear's name to the reconstructed delta, float32 ``[out, in]``.
        linear_bytes: exactly what the linears' deltas take: codes, step sizes, salient channels, indices, factors.
        rest: the other parameters that the method stores its own way, by name; those it leaves out are the expert's.
        rest_bytes: what ``rest`` and the expert's own other parameters take.
        seconds_of: keys of :meth:`Inputs.shared` whose time belongs to the method.
    """

    deltas: dict[str, Tensor]
    linear_bytes: int
    rest: dict[str, Tensor] = field(default_factory=dict)
    rest_bytes: int | None = None
    seconds_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as in the table and on the command line.
        about: what it is, in a line.
        compress: does it. `None` for the two that are no compression: the expert, and the base in the expert's place.
    """

    name: str
    about: str
    compress: Callable[[Inputs], Compressed] | None


def merged_weights(base: State, rest: State, deltas: State) -> dict[str, Tensor]:
    """All parameters of base + delta: linears are ``base + delta`` summed in float32 and rounded to the base's dtype.

    Args:
        base: the base's parameters.
        rest: the parameters that are not the linears', by name; the linears' play no part.
        deltas: linear's name to its delta, float32 ``[out, in]``.
    """
    weights = dict(rest)
    for name, delta in deltas.items():
        key = f"{name}.weight"
        weights[key] = (base[key].float() + delta).to(base[key].dtype)
    return weights


def rest_bytes(base: State, expert: State, linears: Sequence[str]) -> int:
    """Bytes of the expert's parameters outside the linears that differ from the base's, stored whole."""
    inside = {f"{name}.weight" for name in linears}
    return sum(
        value.numel() * value.element_size()
        for key, value in expert.items()
        if key not in inside and not torch.equal(value, base[key])
    )


def synchronize() -> None:
    """Wait for the accelerator, so that a clock tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
