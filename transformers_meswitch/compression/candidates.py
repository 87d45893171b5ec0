"""The ways to store a linear that a budget chooses from, fitted one after the other while its moments are in memory.

What a candidate costs the model is its ``loss``: the output error that it makes on the calibration text, times how
much a unit of such error in this module hurts, which is measured once a module, with the error of the smallest
candidate (:mod:`.damage`). So a loss is the share of a decoder layer's output that the candidate gets wrong, squared;
losses of modules and layers can be compared, and add up as far as errors are independent.

Where that cannot be measured (without calibration, in a model that does not run layer by layer, and outside of the
layers), the output of the module itself stands for that of the layer: the loss is the error's energy over that of what
the module computes, ``tr(E C Eᵀ) / tr(W C Wᵀ)`` with the expert's weight ``W``, and without text ``C = 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from torch import Tensor

from ..configuration import MESwitchConfig
from ..delta_format.spec import LinearRecord, ModuleRecord
from .linear import reconstruct_linear
from .modules import compress_module, weight_difference
from .work_folder import Candidate, Codes

__all__ = ["CandidateFits", "CandidateStore", "candidate_codes", "output_error"]

#: Bits, salient channels in units of those that were asked for, and whether there are column steps.
_CODES = (
    (1, 0, False),
    (1, 0, True),
    (1, 1, True),
    (2, 0, True),
    (2, 1, True),
    (2, 4, True),
    (3, 1, True),
    (4, 1, True),
)


def candidate_codes(config: MESwitchConfig, in_features: int) -> list[Codes]:
    """How the candidates of a linear are stored, the smallest first.

    Args:
        config: its ``salient_channels`` are the unit of theirs; with its ``column_steps``, all have such.
        in_features: input channels of the layer, which caps the salient ones.

    >>> [tuple(codes) for codes in candidate_codes(MESwitchConfig(salient_channels=0, column_steps=True), 64)]
    [(1, 0, True), (2, 0, True), (3, 0, True), (4, 0, True)]
    """
    unit, always = config.salient_channels, config.column_steps
    return list(dict.fromkeys(Codes(bits, min(n * unit, in_features), always or own) for bits, n, own in _CODES))


def output_error(error: Tensor, second_moment: Tensor | None) -> float:
    """Mean squared norm of what a weight error adds to a linear's output: ``tr(E C Eᵀ)``.

    Args:
        error: float32 ``[out, in]``.
        second_moment: float32 ``[in, in]``, ``E[x xᵀ]``, or its diagonal ``[in]``; `None` weighs all channels alike.

    >>> import torch
    >>> output_error(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    1.0
    """
    peak = float(error.abs().max()) if error.numel() else 0.0
    if peak == 0:
        return 0.0
    # Scaled to a peak of one: squares of errors near 1e-20 would underflow.
    scaled = error / peak
    if second_moment is None:
        projected = scaled
    elif second_moment.ndim == 1:
        projected = scaled * second_moment
    else:
        projected = scaled @ second_moment
    # Rounding may take a sum of squares that cancels to just below zero.
    return max(0.0, peak**2 * float((projected * scaled).sum(dim=1).cpu().double().sum()))


class CandidateStore(Protocol):
    """Where candidates go; :class:`~.work_folder.WorkFolder` is one.

    Attributes:
        records: canonical name to record of modules that are finished and have no candidates.
        candidates: module name to its candidates by codes.
    """

    records: dict[str, ModuleRecord]
    candidates: dict[str, dict[Codes, Candidate]]

    def add_candidate(self, name: str, candidate: Candidate, leaves: Mapping[str, Tensor]) -> None:
        """Take a candidate; ``leaves`` by name, on any device."""


class CandidateFits:
    """Fits all candidates of a linear; of one of which some are there, the others.

    ``name in fits`` says whether a module is finished.

    Args:
        config: with a budget.
        store: where candidates go.
        damage: name and weight error, float32 ``[out, in]``, to what it does to the output of the decoder layer (see
            :meth:`~.layerwise.LayerwiseMoments.damage`), or to `None` where that cannot be measured.
    """

    def __init__(
        self,
        config: MESwitchConfig,
        store: CandidateStore,
        damage: Callable[[str, Tensor], float | None] = lambda name, error: None,
    ) -> None:
        self._config, self._store, self._damage = config, store, damage

    def __contains__(self, name: object) -> bool:
        if name in self._store.records:
            return True
        there = self._store.candidates.get(str(name), {})
        first = next(iter(there.values()), None)
        if first is None:
            return False
        wanted = candidate_codes(self._config, first.record.in_features)
        return _is_exact(there.get(wanted[0])) or there.keys() >= set(wanted)

    def fit(
        self,
        base: Mapping[str, Tensor],
        expert: Mapping[str, Tensor],
        *,
        name: str,
        second_moment: Tensor | None,
        is_conv1d: bool,
    ) -> None:
        """Fit the candidates of a linear, each as a delta with these codes throughout would have it.

        Args:
            base: the base's parameters by name; see :func:`~.modules.compress_module`, for errors too.
            expert: the expert's.
            name: canonical module name.
            second_moment: of the inputs, float32 ``[in, in]``.
            is_conv1d: whether the weight is a GPT-2 ``Conv1D``'s ``[in, out]``.
        """
        there = self._store.candidates.get(name, {})
        weight = next((candidate.weight for candidate in there.values()), None)
        compressed = partial(
            compress_module, "linear", base, expert, name=name, second_moment=second_moment, is_conv1d=is_conv1d
        )
        delta: Tensor | None = None
        in_features = expert["weight"].shape[0 if is_conv1d else 1]
        for codes in candidate_codes(self._config, in_features):
            if codes in there:
                continue
            result = compressed(config=self._config.with_codes(*codes))
            if result is None:
                return
            record, leaves = result
            assert isinstance(record, LinearRecord)
            if delta is None:  # after the first, since that one checked the values
                difference = weight_difference(base["weight"], expert["weight"], is_conv1d)
                delta = difference.whole()
                if difference.is_zero():  # in the expert's dtype, which may have fewer bits than the base's
                    delta.zero_()
            lost = delta - reconstruct_linear(record, leaves)
            error = output_error(lost, second_moment)
            if weight is None:
                own = expert["weight"].T if is_conv1d else expert["weight"]
                weight = self._weight(name, lost, error, own, second_moment)
            candidate = Candidate(record, error, weight)
            self._store.add_candidate(name, candidate, leaves)
            if _is_exact(candidate):
                return

    def _weight(self, name: str, lost: Tensor, error: float, own: Tensor, second_moment: Tensor | None) -> float:
        damage = self._damage(name, lost) if error else None
        if damage:
            return damage / error
        energy = output_error(own.float(), second_moment)
        return 1 / energy if energy else 1.0


def _is_exact(candidate: Candidate | None) -> bool:
    """Whether nothing can be better: the first candidate, if it loses nothing, is the smallest, too."""
    return candidate is not None and candidate.error == 0
