"""Fitting a :class:`~.head.HeadRouter`: which layer, how much shrinkage, how sure, and when to abstain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RouterError
from .discriminant import Discriminant, calibrated_temperature
from .projection import project
from .statistics import ClassStatistics

__all__ = ["RANK", "HeadFit", "LayerScore", "check_prompts", "fit_head"]

#: Dimensions that features are projected to.
RANK = 224
#: Prompts of an expert below which nothing can be kept out for validation.
_FEWEST = 5
_SHRINKAGES = (0.003, 0.01, 0.03, 0.1, 0.3)
#: Groups of each expert's prompts, each of which is kept out in turn.
_FOLDS = 5
#: What is to hold for prompts that are routed, on those that were kept out.
_ACCURACY = 0.99
_LOWEST_THRESHOLD = 0.5
#: How many times further than 99 of 100 prompts that were kept out a prompt may be from what the router knows.
_DISTANCE_MARGIN = 1.5


@dataclass(frozen=True)
class LayerScore:
    """How the head on one layer did on prompts that were kept out of its fit.

    Attributes:
        layer: the layer.
        shrinkage: the best there.
        loss: cross-entropy at the best temperature, in nats.
        accuracy: share of prompts whose likeliest expert is the right one.
    """

    layer: int
    shrinkage: float
    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class HeadFit:
    """What :func:`fit_head` found.

    Attributes:
        statistics: of all prompts, at the layer chosen.
        layer: the layer.
        shrinkage: see :class:`~.discriminant.Discriminant`.
        temperature: see :func:`~.discriminant.calibrated_temperature`.
        threshold: probability below which to abstain.
        distance_limit: squared Mahalanobis distance above which to abstain.
        scores: of all layers tried.
    """

    statistics: ClassStatistics
    layer: int
    shrinkage: float
    temperature: float
    threshold: float
    distance_limit: float
    scores: tuple[LayerScore, ...]


def check_prompts(prompts: Mapping[str, Sized], fewest: int = _FEWEST) -> None:
    """Refuse to fit a router to too little.

    Raises:
        RouterError: no expert, or one with fewer than ``fewest`` prompts.
    """
    if not prompts:
        raise RouterError("There are no prompts to fit a router to; give some of each expert.")
    for label, own in prompts.items():
        if len(own) < fewest:
            raise RouterError(
                f"Expert {label!r} has {len(own)} prompts that are not empty; a router needs at least {fewest} of "
                "each, and 50 or more are better."
            )


def fit_head(
    features: Mapping[str, Tensor], layers: Sequence[int], threshold: float | None = None, rank: int = RANK
) -> HeadFit:
    """Fit the head in closed form, and choose the rest by cross-validation. Deterministic.

    Users do not ask what the training prompts ask, so prompts are not kept out at random: those of each expert are
    put in order along their first principal component and cut into 5 groups, and each group in turn is judged by a
    head that has seen nothing like it. Layer and shrinkage are those with the smallest cross-entropy, the lowest
    layer where they tie to 1e-3 nats; temperature, threshold and distance limit are calibrated on the same
    predictions; then the statistics are taken of all prompts.

    Args:
        features: float32 ``[prompts, layers, width]`` of each expert, see
            :func:`~.hidden_states.pooled_hidden_states`.
        layers: the layers' numbers.
        threshold: probability below which to abstain; if `None`, the lowest, from 0.5, at which 99 % of what is
            routed goes to the right expert.
        rank: dimensions to project to.

    Raises:
        RouterError: an expert with fewer than 5 prompts.
    """
    check_prompts(features)
    labels = sorted(features)
    folds = {label: _folds(project(features[label][:, -1], rank)) for label in labels}
    found = []
    for position, layer in enumerate(layers):
        points = {label: project(features[label][:, position], rank) for label in labels}
        found += [_cross_validate(points, folds, layer, shrinkage) for shrinkage in _SHRINKAGES]
    best = min(found, key=lambda one: (round(one.score.loss, 3), one.score.layer))
    position = list(layers).index(best.score.layer)
    return HeadFit(
        ClassStatistics.of({label: project(features[label][:, position], rank) for label in labels}),
        best.score.layer,
        best.score.shrinkage,
        best.temperature,
        threshold if threshold is not None else _threshold(best.probabilities, best.classes),
        _DISTANCE_MARGIN * float(torch.quantile(best.distances, 0.99)),
        tuple(
            min((one.score for one in found if one.score.layer == layer), key=lambda score: score.loss)
            for layer in layers
        ),
    )


def _folds(points: Tensor) -> Tensor:
    """Group of each point ``[n, rank]``, int64 ``[n]``: fifths along the first principal component."""
    centred = points - points.mean(dim=0)
    axis = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
    axis = axis * axis[axis.abs().argmax()].sign()  # which of the two directions is up to the library
    place = (centred @ axis).argsort(stable=True).argsort()
    return place * _FOLDS // len(place)


@dataclass(frozen=True, eq=False)
class _Validated:
    """What heads said of the points kept out of their fits: ``[n, classes]`` and ``[n]``."""

    score: LayerScore
    temperature: float
    probabilities: Tensor
    classes: Tensor
    distances: Tensor


def _cross_validate(
    points: Mapping[str, Tensor], folds: Mapping[str, Tensor], layer: int, shrinkage: float
) -> _Validated:
    scores, distances, classes = [], [], []
    for fold in range(_FOLDS):
        head = Discriminant.of(
            ClassStatistics.of({label: x[folds[label] != fold] for label, x in points.items()}), shrinkage
        )
        for i, (label, x) in enumerate(points.items()):
            kept_out = x[folds[label] == fold]
            scores.append(head.scores(kept_out))
            distances.append(head.distances(kept_out))
            classes.append(torch.full((len(kept_out),), i))
    all_scores, right = torch.cat(scores), torch.cat(classes)
    temperature = calibrated_temperature(all_scores, right)
    logs = (all_scores / temperature).log_softmax(dim=1)
    loss = abs(float(logs.gather(1, right.unsqueeze(1)).mean()))
    accuracy = float((logs.argmax(dim=1) == right).double().mean())
    return _Validated(
        LayerScore(layer, shrinkage, loss, accuracy), temperature, logs.exp(), right, torch.cat(distances)
    )


def _threshold(probabilities: Tensor, classes: Tensor) -> float:
    """The lowest threshold at which enough of what is routed goes right."""
    confidence, chosen = probabilities.max(dim=1)
    right = (chosen == classes).double()
    candidates = [_LOWEST_THRESHOLD, *sorted(c for c in confidence.tolist() if c > _LOWEST_THRESHOLD)]
    return next((c for c in candidates if float(right[confidence >= c].mean()) >= _ACCURACY), 1.0)
