"""What all producers share: the loop over a model's modules, and the delta that comes of it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..configuration import MESwitchConfig, MESwitchExpertConfig
from ..delta_format.fingerprint import fingerprint_checkpoint
from ..delta_format.location import RepoLocation
from ..delta_format.spec import ModuleRecord
from ..errors import CompressionError, UnsupportedModelError
from ..module_kinds import is_conv1d, module_kinds
from .expert_config import expert_config
from .layerwise import SecondMoments
from .modules import check_shapes, compress_module
from .sources import Parameters, Source, input_embedding, output_head
from .work_folder import FinishedModules

__all__ = ["check_model_type", "compress_expert", "compress_modules"]


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
        device: see :func:`compress_modules`.
        progress: whether to show a progress bar.

    Raises:
        CompressionError: as :func:`compress_modules`, and when the weights are equal.
        UnsupportedModelError: as :func:`compress_modules`.
    """
    for name, record, leaves in compress_modules(
        model,
        base_parameters,
        expert_parameters,
        config,
        finished=finished.records,
        second_moments=second_moments,
        device=device,
        progress=progress,
    ):
        finished.add(name, record, leaves)
    if not finished.records:
        raise CompressionError(
            f"{expert} and {base.location} hold equal weights; there is no delta to store. Give a fine-tune."
        )
    return expert_config(
        config,
        finished.records,
        base=base.location.repo,
        base_revision=base.checkpoint.revision,
        base_fingerprint=fingerprint_checkpoint(base.checkpoint.paths),
        expert=expert.repo,
        model_config=model.config,
        generation_config=generation_config,
        vocab_size=expert_parameters.shapes(input_embedding(model))["weight"][0],
        tied=expert_parameters.tied,
        calibrated=second_moments is not None,
    )


def check_model_type(base: Source, expert: RepoLocation, model_config: PreTrainedConfig) -> None:
    """Refuse an expert of another architecture before any weights are read.

    Raises:
        CompressionError: the model types differ.
    """
    if base.config.model_type != model_config.model_type:
        raise CompressionError(
            f"{expert} is of model_type {model_config.model_type!r} and {base.location} of "
            f"{base.config.model_type!r}. The expert is of another architecture; a delta needs a fine-tune of this "
            "base."
        )


def compress_modules(
    model: PreTrainedModel,
    base: Parameters,
    expert: Parameters,
    config: MESwitchConfig,
    *,
    finished: Container[str] = (),
    second_moments: SecondMoments | None = None,
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
        second_moments: linear's name to float32 ``[in, in]``, ``E[x xᵀ]`` of its inputs, asked for in the order of the
            modules, see :mod:`.layerwise`; a linear for which there is none is weighed evenly.
        device: where to compute; `None` is where the expert's parameters are.
        progress: whether to show a progress bar.

    Yields:
        Canonical module name, record, and leaves by name on the device of the computation.

    Raises:
        UnsupportedModelError: a layer that the format has no place for.
        CompressionError: base and expert of different architectures; NaN or infinite weights. The tensor is named.
    """
    kinds = module_kinds(model)
    _check_architecture(kinds, base, expert)
    head = output_head(model)
    for name, following in tqdm(
        zip(kinds, [*list(kinds)[1:], None], strict=True),
        total=len(kinds),
        desc="Compressing",
        unit="module",
        disable=not progress,
    ):
        if name in finished:
            continue
        if following is not None:
            for parameters in (base, expert):
                parameters.announce(following)
        if name == head and base.tied and expert.tied:
            _check_tied_head(name, base, expert)
            continue
        ours, theirs = expert.of(name), base.of(name)
        where = next(iter(ours.values())).device if device is None else torch.device(device)
        result = compress_module(
            kinds[name],
            {key: value.to(where) for key, value in theirs.items()},
            {key: value.to(where) for key, value in ours.items()},
            name=name,
            config=config,
            second_moment=_second_moment(second_moments, name) if kinds[name] == "linear" else None,
            is_conv1d=is_conv1d(model.get_submodule(name)),
        )
        if result is not None:
            yield name, *result


def _second_moment(moments: SecondMoments | None, name: str) -> Tensor | None:
    moment = None if moments is None else moments.get(name)
    # compress_linear() weighs channels one by one; this is the only place that knows of the whole matrix.
    return None if moment is None else moment.diagonal()


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


def _check_tied_head(name: str, base: Parameters, expert: Parameters) -> None:
    """A tied head is stored with the embedding; there is no place for a bias of its own."""
    ours, theirs = expert.of(name), base.of(name)
    for key in sorted(set(ours) - {"weight"}):
        if ours[key].shape != theirs[key].shape or not torch.equal(ours[key], theirs[key].to(ours[key])):
            raise UnsupportedModelError(
                f"{name}.{key} differs between base and expert, and {name}.weight is tied to the input embedding; "
                "the delta format has no place for parameters of a tied output head."
            )
