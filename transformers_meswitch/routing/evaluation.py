"""How well a router does on prompts whose expert is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RouterError
from .output import RouterOutput

__all__ = ["CalibrationBin", "Evaluation", "evaluate"]

#: Bins of the calibration curve, of equal width.
_BINS = 10


@dataclass(frozen=True)
class CalibrationBin:
    """Prompts whose likeliest expert has a probability in some range.

    Attributes:
        prompts: how many.
        confidence: their mean probability.
        accuracy: how many of them are right, as a share.
    """

    prompts: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What :func:`evaluate` measures.

    Attributes:
        labels: the experts the router chose among.
        confusion: int64 ``[labels, labels + 1]``: prompts by right expert and by where they went; the last column
            are abstentions.
        accuracy: share of all prompts whose likeliest expert is the right one, abstentions or not.
        coverage: share that is routed.
        routed_accuracy: of these, the share that goes right; NaN if there are none.
        recall: by expert, the share of its prompts that are routed to it.
        precision: by expert, the share of what is routed to it that is its own; NaN if nothing is.
        calibration_error: expected calibration error over 10 bins of equal width (Guo et al.,
            arXiv 1706.04599, eq. 3).
        calibration: the bins that have prompts, by confidence.
    """

    labels: tuple[str, ...]
    confusion: Tensor
    accuracy: float
    coverage: float
    routed_accuracy: float
    recall: dict[str, float]
    precision: dict[str, float]
    calibration_error: float
    calibration: tuple[CalibrationBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON, in which NaN is `None`."""
        return {
            "prompts": int(self.confusion.sum()),
            "accuracy": self.accuracy,
            "coverage": self.coverage,
            "routed_accuracy": _number(self.routed_accuracy),
            "calibration_error": self.calibration_error,
            "recall": {label: _number(value) for label, value in self.recall.items()},
            "precision": {label: _number(value) for label, value in self.precision.items()},
            "labels": list(self.labels),
            "confusion": self.confusion.tolist(),
            "calibration": [vars(one) for one in self.calibration],
        }


def _number(value: float) -> float | None:
    return value if value == value else None


def evaluate(output: RouterOutput, right: Sequence[str]) -> Evaluation:
    """Compare what a router said with the right experts.

    Args:
        output: for each prompt.
        right: the right expert of each prompt; ``"base"`` is the base.

    Raises:
        RouterError: no prompts, or an expert that the router did not choose among.

    >>> probabilities, abstained = torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([False, True])
    >>> output = RouterOutput(["a", None], probabilities, ["a", "b"], abstained)
    >>> found = evaluate(output, ["a", "b"])
    >>> found.accuracy, found.coverage, found.routed_accuracy, found.confusion.tolist()
    (1.0, 0.5, 1.0, [[1, 0, 0], [0, 0, 1]])
    """
    labels = tuple(output.labels)
    unknown = next((label for label in right if label not in labels), None)
    if unknown is not None or not right:
        what = "There are no prompts" if unknown is None else f"There are prompts of {unknown!r}"
        raise RouterError(f"{what}; the router chooses among {', '.join(map(repr, labels))}. Give prompts of these.")
    truth = torch.tensor([labels.index(label) for label in right])
    confidence, likeliest = output.probabilities.double().max(dim=1)
    routed = ~output.abstained
    went = torch.where(routed, likeliest, len(labels))
    confusion = torch.zeros(len(labels), len(labels) + 1, dtype=torch.int64)
    confusion.index_put_((truth, went), torch.ones_like(truth), accumulate=True)
    correct = (likeliest == truth).double()
    own = confusion[:, :-1].diagonal().double()
    bins = (confidence * _BINS).long().clamp_max(_BINS - 1)
    calibration = tuple(
        CalibrationBin(int(here.sum()), float(confidence[here].mean()), float(correct[here].mean()))
        for here in (bins == i for i in range(_BINS))
        if bool(here.any())
    )
    return Evaluation(
        labels,
        confusion,
        float(correct.mean()),
        float(routed.double().mean()),
        float(correct[routed].mean()),
        dict(zip(labels, (own / confusion.sum(dim=1)).tolist(), strict=True)),
        dict(zip(labels, (own / confusion[:, :-1].sum(dim=0)).tolist(), strict=True)),
        sum(one.prompts * abs(one.confidence - one.accuracy) for one in calibration) / len(right),
        calibration,
    )
