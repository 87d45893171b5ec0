"""What all producers share: the loop over a model's modules, and the delta that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, PreTrainedModel

from ..configuration import MESwitchConfig, MESwitchExpertConfig
from ..delta_format.fingerprint import fingerprint_checkpoint
from ..delta_format.location import RepoLocation
from ..delta_format.spec import ModuleRecord
from ..errors import CompressionError, UnsupportedModelError
from ..module_kinds import is_conv1d, module_kinds
from .candidates import CandidateFits
from .drift import Drift
from .expert_config import expert_config
from .layerwise import SecondMoments
from .modules import check_shapes, compress_module
from .request import check_layer_bits
from .sources import Parameters, Source, input_embedding, output_head
from .work_folder import Codes, FinishedModules

__all__ = ["Budget", "Drifts", "compress_expert", "compress_modules", "write_behind"]


class Drifts(Protocol):
    """How far the inputs of linears are from the expert's, as they are in the model that is being made."""

    def order(self, names: Sequence[str], /) -> list[str]:
        """Modules in the order in which to compress them, given in that of the model."""

    def drift(self, name: str) -> Drift | None:
        """Of the inputs of a linear, of which the second moments are those in the model that is being made.

        Returns:
            `None` if the linear is not to make up for it.
        """

    def settle(self, name: str, record: ModuleRecord, leaves: Mapping[str, Tensor]) -> None:
        """Be told that a module was compressed, which is part of the model from now on."""


@dataclass(frozen=True)
class Budget:
    """What a budget is spent with.

    Attributes:
        candidates: fits the candidates of the linears that it chooses for.
        spend: chooses among them once all are fitted, see :func:`~.spending.spend`; it is given a function that
            describes what is chosen.
        refit: fits what was chosen once more, each linear to what the choice makes of those before it; `None` leaves
            it as it is.
    """

    candidates: CandidateFits
    spend: Callable[[Callable[[], MESwitchExpertConfig]], None]
    refit: Callable[[], None] | None = None


def compress_expert(
    model: PreTrainedModel,
    base: Source,
    base_parameters: Parameters,
    expert: RepoLocation,
    expert_parameters: Parameters,
    config: MESwitchConfig,
    finished: FinishedModules,
    *,
    generation_config: GenerationConfig,
    second_moments: SecondMoments | None = None,
    drifts: Drifts | None = None,
    budget: Budget | None = None,
    full_fingerprint: bool = False,
    calibration: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> MESwitchExpertConfig:
    """The delta of an expert: its modules go to ``finished``, its ``adapter_config.json`` is returned.

    Args:
        model: the expert's causal LM with its own configuration; see :func:`compress_modules`.
        base: the base's files.
        base_parameters: its parameters.
        expert: the expert's repo.
        expert_parameters: its parameters.
        config: bits, salient channels and column steps.
        finished: where modules go; those that it has already are not worked on again.
        generation_config: the expert's.
        second_moments: see :func:`compress_modules`; `None` says that there was no calibration.
        drifts: see :func:`compress_modules`.
        budget: what the config's budget is spent with, whose candidates go where ``finished`` is.
        full_fingerprint: whether to fingerprint every byte of the base.
        calibration: where the calibration text can be read again, for the record.
        device: see :func:`compress_modules`.
        progress: whether to show a progress bar.

    Raises:
        CompressionError: as :func:`compress_modules`, and when the weights are equal.
        UnsupportedModelError: as :func:`compress_modules`.
    """
    write_behind(
        compress_modules(
            model,
            base_parameters,
            expert_parameters,
            config,
            finished=frozenset(finished.records) if budget is None else budget.candidates,
            second_moments=second_moments,
            drifts=drifts,
            candidates=None if budget is None else budget.candidates,
            device=device,
            progress=progress,
        ),
        finished,
    )
    fingerprint = fingerprint_checkpoint(base.checkpoint.paths, full=full_fingerprint)

    def description() -> MESwitchExpertConfig:
        return expert_config(
            config,
            finished.records,
            base=base.location.repo,
            base_revision=base.checkpoint.revision,
            base_fingerprint=fingerprint,
            expert=expert.repo,
            model_config=model.config,
            generation_config=generation_config,
            vocab_size=expert_parameters.shapes(input_embedding(model))["weight"][0],
            tied=expert_parameters.tied,
            calibrated=second_moments is not None,
            calibration=calibration,
        )

    if budget is not None:
        budget.spend(description)
        if budget.refit is not None:
            budget.refit()
    if not finished.records:
        raise CompressionError(
            f"{expert} and {base.location} hold equal weights; there is no delta to store. Give a fine-tune."
        )
    return description()


def write_behind(modules: Iterable[tuple[str, ModuleRecord, dict[str, Tensor]]], finished: FinishedModules) -> None:
    """Put modules where they go, one being written, which waits for the disk, while the next is worked on.

    Args:
        modules: what :func:`compress_modules` yields.
        finished: where they go.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="write-behind") as writer:
        written: Future[None] | None = None
        for module in modules:
            if written is not None:
                written.result()
            written = writer.submit(finished.add, *module)
        if written is not None:
            written.result()


def compress_modules(
    model: PreTrainedModel,
    base: Parameters,
    expert: Parameters,
    config: MESwitchConfig,
    *,
    finished: Container[str] = (),
    codes: Mapping[str, Codes] | None = None,
    second_moments: SecondMoments | None = None,
    drifts: Drifts | None = None,
    candidates: CandidateFits | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, ModuleRecord, dict[str, Tensor]]]:
    """The changed modules of an expert one after the other, one pair of modules in memory at a time.

    Shapes are checked for all modules before the first is worked on.

    Args:
        model: the expert's causal LM, on any device, ``meta`` included; only its structure is used.
        base: the base's parameters.
        expert: the expert's parameters.
        config: bits, salient channels and column steps.
        finished: names of modules to leave out.
        codes: linears that are stored otherwise than the config says.
        second_moments: name of a linear or of the output head to float32 ``[in, in]``, ``E[x xᵀ]`` of its inputs,
            asked for in the order of the modules, see :mod:`.layerwise`; one for which there is none is weighed
            evenly. An embedding whose rows the output head shares goes by the head's, and comes last.
        drifts: what linears are to make up for, with ``second_moments`` of the same inputs; it is told of every module
            before that is yielded.
        candidates: takes the linears whose bits a budget chooses, which are not yielded.
        device: where to compute; `None` is where the expert's parameters are.
        progress: whether to show a progress bar.

    Yields:
        Canonical module name, record, and leaves by name on the device of the computation.

    Raises:
        UnsupportedModelError: a layer that the format has no place for.
        CompressionError: base and expert of different architectures; NaN or infinite weights (the tensor is named);
            a pattern of ``layer_bits`` that matches no linear layer or embedding.
    """
    kinds = module_kinds(model)
    check_layer_bits(config, [name for name, kind in kinds.items() if kind in ("linear", "rows")])
    _check_architecture(kinds, base, expert)
    head, embedding = output_head(model), input_embedding(model)
    # The two are one matrix and must stay so, but each would be quantised against a matrix of its own.
    kept_equal = (head, embedding) if expert.tied and not base.tied else ()
    order, used_as = list(kinds), {name: name for name in kinds}
    if base.tied and expert.tied and head is not None:
        order = [*(name for name in kinds if name != embedding), embedding]
        used_as[embedding] = head
    if drifts is not None:
        order = drifts.order(order)
    for name, following in tqdm(
        zip(order, [*order[1:], None], strict=True),
        total=len(order),
        desc="Compressing",
        unit="module",
        disable=not progress,
    ):
        if name in finished:
            continue
        ours, theirs = expert.of(name), base.of(name)
        if following is not None:
            for parameters in (base, expert):
                parameters.announce(following)
        if name == head and base.tied and expert.tied:
            _check_tied_head(name, ours, theirs)
            continue
        where = next(iter(ours.values())).device if device is None else torch.device(device)
        theirs = {key: value.to(where) for key, value in theirs.items()}
        ours = {key: value.to(where) for key, value in ours.items()}
        moment = _second_moment(second_moments, used_as[name], shared=used_as[name] != name)
        conv1d = is_conv1d(model.get_submodule(name))
        if candidates is not None and kinds[name] == "linear" and not config.is_pinned(name):
            candidates.fit(theirs, ours, name=name, second_moment=moment, is_conv1d=conv1d)
            continue
        result = compress_module(
            kinds[name],
            theirs,
            ours,
            name=name,
            config=config.with_codes(*codes[name]) if codes and name in codes else config,
            second_moment=moment,
            drift=None if drifts is None or kinds[name] != "linear" else drifts.drift(name),
            is_conv1d=conv1d,
            exact_rows=name in kept_equal,
        )
        if result is not None:
            if drifts is not None:
                drifts.settle(name, *result)
            yield name, *result


def _second_moment(moments: SecondMoments | None, name: str, shared: bool) -> Tensor | None:
    moment = None if moments is None else moments.get(name)
    # Errors of rows that cancel in the output head do not where the rows are looked up.
    return moment if moment is None or not shared or moment.ndim == 1 else moment.diagonal()


def _check_architecture(kinds: Mapping[str, str], base: Parameters, expert: Parameters) -> None:
    alone = sorted(set(base.modules) ^ set(expert.modules))
    if alone:
        whose, other = ("base", "expert") if alone[0] in base.modules else ("expert", "base")
        raise CompressionError(
            f"The {whose} has a layer {alone[0]} and the {other} has not ({len(alone)} layers are in one only). "
            "The expert is of another architecture; a delta needs a fine-tune of this base."
        )
    for name, kind in kinds.items():
        check_shapes(kind, base.shapes(name), expert.shapes(name), name)


def _check_tied_head(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """A tied head is stored with the embedding; there is no place for a bias of its own."""
    for key in sorted(set(ours) - {"weight"}):
        if ours[key].shape != theirs[key].shape or not torch.equal(ours[key], theirs[key].to(ours[key])):
            raise UnsupportedModelError(
                f"{name}.{key} differs between base and expert, and {name}.weight is tied to the input embedding; "
                "the delta format has no place for parameters of a tied output head."
            )
