"""``HeadRouter``: a linear head on the base's own hidden states, kilobytes beside a model that is in memory anyway."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..delta_format.location import RepoLocation
from ..errors import ExpertNameError, ExpertNotFoundError, RouterError
from ..peft_method.naming import check_expert_name
from .base import BaseRouter, check_integer, check_number, listed
from .discriminant import Discriminant
from .early_graphs import capture, replayed
from .files import read_tensors, write
from .head_fit import LayerScore, check_prompts, fit_head
from .hidden_states import check_layers, early_layers, pooled_hidden_states
from .output import BASE_LABEL
from .projection import project
from .statistics import ClassStatistics
from .texts import Prompt, routed_text
from .window import window_ids

__all__ = ["HeadRouter"]

_BATCH = 64
_FEWEST_ADDED = 2
_LARGEST_WINDOW = 4096
# What files may hold: far beyond what fits are, and far below what would keep a machine busy.
_LARGEST_RANK = 2048
_MOST_LABELS = 10_000
_MOST_PROMPTS = 2**40


@dataclass(frozen=True, eq=False)
class HeadRouter(BaseRouter):
    """Linear discriminant analysis on mean hidden states of the base after a few of its layers.

    The head is worked out from each expert's count, mean and scatter of its prompts, which is all that is kept of
    them (:class:`~.statistics.ClassStatistics`). An expert is added from its own prompts alone, or removed: statistics
    of one expert do not depend on another's prompts, and neither does the projection of the features, so those of the
    others stay as they are, to the bit. Layer, shrinkage, temperature, threshold and distance limit stay as they were
    fitted, where a fit to all prompts at once might have chosen others.

    A router is never changed: what adds to it returns another.

    Attributes:
        statistics: of each expert's features; the label ``"base"`` is the base.
        width: hidden size of the base.
        layer: how many of its layers are run.
        window: tokens of a prompt that are read at most, half at its beginning, half at its end.
        shrinkage: of the covariance, see :class:`~.discriminant.Discriminant`.
        temperature: what scores are divided by, so that probabilities are right as often as they say.
        threshold: the router abstains where no expert is at least this likely.
        distance_limit: it also abstains where a prompt is further, in squared Mahalanobis distance, from each
            expert's prompts.
        default_expert: who answers where it abstains; `None` is the base.
        base_digest: of the base's checkpoint, as the experts' ``adapter_config.json`` name it; `None` if they do not.
    """

    statistics: ClassStatistics
    width: int
    layer: int
    window: int
    shrinkage: float
    temperature: float
    threshold: float
    distance_limit: float
    default_expert: str | None = None
    base_digest: str | None = None
    _heads: dict[tuple[str, ...], Discriminant] = field(default_factory=dict, repr=False)

    router_type = "head"

    @property
    def labels(self) -> list[str]:
        """The experts it knows, sorted; ``"base"`` is the base."""
        return list(self.statistics.labels)

    # -- fitting ----------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        model: Any,
        prompts: Mapping[str, Sequence[Prompt]],
        *,
        layers: Sequence[int] | None = None,
        window: int = 256,
        threshold: float | None = None,
        default_expert: str | None = None,
        progress: bool = True,
        on_layers: Callable[[tuple[LayerScore, ...]], None] | None = None,
    ) -> HeadRouter:
        """Fit a router to prompts of each expert; seconds on a CPU for a small base.

        Args:
            model: a model with experts, such as a family; its base is what is read.
            prompts: expert to prompts, texts or conversations (of which the last user's message counts); ``"base"``
                names what the base itself is to answer.
            layers: those to choose from; the first quarter of the base's by default.
            window: tokens of a prompt to read at most.
            threshold: probability below which to abstain; chosen by validation if `None`.
            default_expert: who answers where it abstains; `None` is the base.
            progress: whether to show a progress bar.
            on_layers: is given what each layer was worth in validation.

        Raises:
            RouterError: too few prompts of an expert, a window or threshold out of range.
            ExpertNotFoundError: an expert that is not loaded.
            UnsupportedModelError: the base has no such layer.
        """
        check_number("threshold", 0.5 if threshold is None else threshold, 0.0, 1.0)
        check_integer("window", window, 2, _LARGEST_WINDOW)
        _check_loaded([*prompts, *([] if default_expert is None else [default_expert])], model)
        layers = early_layers(model) if layers is None else list(layers)
        check_layers(model, layers)
        rows = {label: _rows(model, own, window) for label, own in prompts.items()}
        check_prompts(rows)
        total = sum(map(len, rows.values()))
        with tqdm(total=total, desc="Reading prompts", unit="prompt", disable=not progress) as bar:
            features = {label: _pooled(model, own, layers, bar.update) for label, own in rows.items()}
        fit = fit_head(features, layers, threshold)
        if on_layers is not None:
            on_layers(fit.scores)
        return cls(
            fit.statistics,
            int(next(iter(features.values())).shape[2]),
            fit.layer,
            window,
            fit.shrinkage,
            fit.temperature,
            fit.threshold,
            fit.distance_limit,
            None if default_expert == BASE_LABEL else default_expert,
            _base_digest(model),
        )

    def with_expert(self, model: Any, expert: str, prompts: Sequence[Prompt]) -> HeadRouter:
        """This and one more expert, or other prompts for one that it knows; the others' prompts are not needed.

        Args:
            model: a model with the experts.
            expert: its name; ``"base"`` is the base.
            prompts: some of its prompts.

        Raises:
            RouterError: fewer than two prompts.
            ExpertNotFoundError: the expert is not loaded.
        """
        self.check(model)
        _check_loaded([expert], model)
        rows = _rows(model, prompts, self.window)
        check_prompts({expert: rows}, _FEWEST_ADDED)
        added = ClassStatistics.of({expert: self._points(_pooled(model, rows, [self.layer])[:, 0])})
        return dataclasses.replace(self, statistics=self.statistics.joined(added), _heads={})

    def only(self, labels: Sequence[str]) -> HeadRouter | None:
        """This with those of its experts that are among ``labels``; `None` if it knows none of them."""
        statistics = self.statistics.only(labels)
        default = self.default_expert if self.default_expert in labels else None
        if not statistics.labels:
            return None
        return dataclasses.replace(self, statistics=statistics, default_expert=default, _heads={})

    # -- routing ----------------------------------------------------------------------------------------------------

    def check(self, model: Any) -> None:
        """Refuse a model of another width, of fewer layers, or whose experts are known to be of another base.

        Raises:
            RouterError: the router was fitted to another base.
            UnsupportedModelError: the base has no such layer.
        """
        width = model.config.get_text_config().hidden_size
        if width != self.width:
            raise RouterError(
                f"The router was fitted to a base of hidden size {self.width}, but {type(model).__name__} has "
                f"{width}. Train one for this base: HeadRouter.train(model, prompts)."
            )
        digest = _base_digest(model)
        if self.base_digest is not None and digest is not None and digest != self.base_digest:
            raise RouterError(
                f"The router was fitted to the base with digest {self.base_digest[:16]}…, but the experts are of the "
                f"base with digest {digest[:16]}…. Train one for this base: HeadRouter.train(model, prompts)."
            )
        check_layers(model, [self.layer])

    def judge(self, model: Any, rows: Sequence[Sequence[int]], labels: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """As of every router; what is far from all prompts it was fitted to is like nothing it knows."""
        if labels not in self._heads:
            self._heads[labels] = Discriminant.of(self.statistics.only(labels), self.shrinkage)
        head = self._heads[labels]
        points = self._points(_pooled(model, rows, [self.layer])[:, 0])
        likely = (head.scores(points) / self.temperature).softmax(dim=1)
        return likely, head.distances(points) > self.distance_limit

    def capture(self, model: Any) -> None:
        """Capture the base's first layers in CUDA graphs, so that a GPU does not wait for Python when routing.

        From then on prompts that are routed one at a time replay them. They take memory for the activations of one
        window. Where the base was moved, cast or changed since, is in training mode, or has hooks in those layers,
        prompts are read without them, until they are captured again. Weights may be written to, and experts come and
        go.

        Call it before other threads use the GPU: with PyTorch before 2.13, one that draws random numbers meanwhile may
        fail.

        Args:
            model: a model with the experts, all of it on one GPU and in evaluation mode.

        Raises:
            RouterError: it was fitted to another base.
            UnsupportedOperationError: a model whose layers cannot be captured as they are, such as a quantised one.
            UnsupportedModelError: layers that do what cannot be captured.
        """
        self.check(model)
        capture(model, self.layer, self.window)

    def _points(self, pooled: Tensor) -> Tensor:
        """Float32 ``[rows, width]`` to float64 ``[rows, rank]``."""
        return project(pooled, self.statistics.rank)

    # -- saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``router_config.json`` and ``router.safetensors``."""
        config = {
            "router_type": self.router_type,
            "labels": self.labels,
            **{name: getattr(self, name) for name in (*_INTEGERS, *_NUMBERS)},
            "default_expert": self.default_expert,
            "base_digest": self.base_digest,
        }
        s = self.statistics
        write(Path(save_directory), config, {"counts": s.counts, "means": s.means, "scatters": s.scatters})

    @classmethod
    def from_files(cls, config: Mapping[str, Any], location: RepoLocation) -> HeadRouter:
        """What :func:`~.files.read_config` found, with its tensors, checked."""
        labels = config.get("labels")
        if not isinstance(labels, list) or not labels or len(set(map(str, labels))) < len(labels):
            raise RouterError(f"{location}: labels is {labels!r}, expected a list of distinct experts.")
        if len(labels) > _MOST_LABELS:
            raise RouterError(f"{location}: {len(labels)} labels, expected {_MOST_LABELS} at most.")
        default = config.get("default_expert")
        for name in [*labels, *([] if default is None else [default])]:
            try:
                if name != BASE_LABEL:
                    check_expert_name(name, (), ())
            except ExpertNameError as error:
                raise RouterError(f"{location}: {error}") from error
        for name, (least, most) in _INTEGERS.items():
            check_integer(name, config.get(name), least, most, f"{location}: ")
        for name, (low, high) in _NUMBERS.items():
            check_number(name, config.get(name), low, high, f"{location}: ")
        digest = config.get("base_digest")
        if digest is not None and not isinstance(digest, str):
            raise RouterError(f"{location}: base_digest is {digest!r}, expected a text or null.")
        statistics = _checked_statistics(labels, read_tensors(location), config["shrinkage"], str(location))
        values = {name: config[name] for name in (*_INTEGERS, *_NUMBERS)}
        if statistics.rank > values["width"]:
            raise RouterError(
                f"{location}: features have {statistics.rank} dimensions, more than the base's width, "
                f"{values['width']}."
            )
        return cls(statistics, **values, default_expert=default, base_digest=digest)


#: Entries of the config, with what they may be.
_INTEGERS = {"width": (1, 2**20), "layer": (0, 2**12), "window": (2, _LARGEST_WINDOW)}
_NUMBERS = {
    "shrinkage": (0.0, 1.0),
    "temperature": (1e-6, 1e6),
    "threshold": (0.0, 1.0),
    "distance_limit": (0.0, sys.float_info.max),
}


def _checked_statistics(
    labels: list[str], tensors: Mapping[str, Tensor], shrinkage: float, where: str
) -> ClassStatistics:
    classes = len(labels)
    means = tensors.get("means")
    rank = int(means.shape[1]) if means is not None and means.dim() == 2 else 0
    if rank > _LARGEST_RANK:
        raise RouterError(f"{where}: features have {rank} dimensions, expected {_LARGEST_RANK} at most.")
    expected = {
        "counts": (torch.int64, (classes,)),
        "means": (torch.float32, (classes, rank)),
        "scatters": (torch.float32, (classes, rank * (rank + 1) // 2)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = tensors.get(name)
        found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.numel():
            raise RouterError(f"{where}: tensor {name!r} is {found}, expected {dtype} {shape} of {classes} labels.")
        if not bool(torch.isfinite(tensor).all()) or (
            name == "counts" and not 1 <= int(tensor.min()) <= int(tensor.max()) <= _MOST_PROMPTS
        ):
            raise RouterError(f"{where}: tensor {name!r} holds values out of range. Train the router again.")
    order = sorted(range(classes), key=labels.__getitem__)
    statistics = ClassStatistics(
        tuple(labels[i] for i in order), *(tensors[name][order] for name in ("counts", "means", "scatters"))
    )
    unusable = RouterError(f"{where}: tensor 'scatters' is no covariance. Train the router again.")
    try:
        least = float(torch.linalg.eigvalsh(statistics.covariance()).min())
        if not least >= -1e-3 * float(statistics.scatters.abs().max()):
            raise unusable
        head = Discriminant.of(statistics, shrinkage)
    except (torch.linalg.LinAlgError, OverflowError) as error:
        raise unusable from error
    if not bool(head.weight.isfinite().all()):
        raise unusable
    return statistics


def _check_loaded(labels: Sequence[str], model: Any) -> None:
    for label in labels:
        if label != BASE_LABEL and label not in model.experts:
            raise ExpertNotFoundError(
                f"No expert named {label!r} is loaded. Loaded: {listed(model.experts)}; 'base' is the base."
            )


def _base_digest(model: Any) -> str | None:
    """The digest of the base that the loaded experts name; `None` if they name none, or not the same."""
    configs = getattr(model, "peft_config", {}).values()
    prints = [print_ for config in configs if (print_ := getattr(config, "base_fingerprint", None)) is not None]
    digests = {str(print_["digest"]) for print_ in prints if "digest" in print_}
    return digests.pop() if len(digests) == 1 else None


def _rows(model: Any, prompts: Sequence[Prompt], window: int) -> list[list[int]]:
    """Token windows of the prompts that are not empty."""
    if isinstance(prompts, str):
        raise RouterError(f"Prompts are {prompts[:40]!r}, a text; expected a list of texts.")
    rows = window_ids(model.tokenizer_for(None), [routed_text(prompt) for prompt in prompts], window)
    return [row for row in rows if row]


def _pooled(
    model: Any, rows: Sequence[Sequence[int]], layers: Sequence[int], done: Callable[[int], Any] = lambda n: None
) -> Tensor:
    """Features of the base, float32 ``[rows, layers, width]``, with the experts off."""
    found = []
    with model._meswitch_switch.rows([None]):
        if len(rows) == len(layers) == 1 and (alone := replayed(model, rows[0], layers[0])) is not None:
            return alone
        for start in range(0, len(rows), _BATCH):
            found.append(pooled_hidden_states(model, rows[start : start + _BATCH], layers))
            done(len(found[-1]))
    return torch.cat(found)
