"""Where the parameters of a base or an expert are read from: a checkpoint's files, or a live model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..delta_format.checkpoint import Checkpoint, resolve_checkpoint
from ..delta_format.location import RepoLocation
from ..errors import CheckpointError, CompressionError, UnsupportedModelError
from .names import map_names

__all__ = [
    "CheckpointParameters",
    "LiveParameters",
    "Parameters",
    "Source",
    "input_embedding",
    "locate",
    "meta_model",
    "output_head",
]


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found.

    Attributes:
        location: its repo, at the commit that was found.
        config: its ``config.json``.
        checkpoint: its safetensors files.
    """

    location: RepoLocation
    config: PreTrainedConfig
    checkpoint: Checkpoint


def locate(location: RepoLocation) -> Source:
    """Find a checkpoint's configuration and safetensors files, all of one commit.

    Raises:
        CheckpointError: a missing, truncated or unreadable file.
        CompressionError: the checkpoint is quantised.
    """
    path = location.require("config.json")
    location = location.pinned(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a model's configuration: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise CompressionError(
            f"{location} is a quantised checkpoint (config.json has a quantization_config); deltas are formed between "
            "the checkpoints before quantisation."
        )
    checkpoint = resolve_checkpoint(
        location.repo,
        location.revision,
        location.token,
        location.cache_dir,
        location.local_files_only,
        location.subfolder,
    )
    return Source(location, config, checkpoint)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal LM of a configuration without memory for its weights.

    Raises:
        UnsupportedModelError: transformers has no causal LM for the configuration.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedModelError(f"There is no causal LM of model_type {config.model_type!r}: {error}") from error


def output_head(model: PreTrainedModel) -> str | None:
    """Canonical name of the output head; `None` if the model has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def input_embedding(model: PreTrainedModel) -> str:
    """Canonical name of the input embedding."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


class Parameters(Protocol):
    """A model's parameters by canonical module name.

    Attributes:
        tied: whether the output head is the input embedding.
        modules: canonical names of the modules that own parameters.
    """

    tied: bool
    modules: tuple[str, ...]

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters by name; nothing is read."""

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own parameters by name. A tied output head gives the input embedding's weight."""

    def announce(self, module: str) -> None:
        """Say that a module is next, so that reading it can begin."""


def _own_parameters(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Module name to its parameters' names, short to full; parameters that are tied are under each of their owners."""
    owned: dict[str, dict[str, str]] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        names = {name: prefix + name for name, _ in module.named_parameters(recurse=False)}
        if names:
            owned[module_name] = names
    return owned


class LiveParameters:
    """Parameters of a model in memory; see :class:`Parameters`.

    Args:
        model: a causal LM whose weights are not quantised.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._owned = _own_parameters(model)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.tied = head is not None and head.weight is embedding.weight
        self.modules = tuple(self._owned)

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters by name."""
        return {name: tuple(self._model.get_parameter(full).shape) for name, full in self._owned[module].items()}

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own parameters by name, the model's memory."""
        return {name: self._model.get_parameter(full).detach() for name, full in self._owned[module].items()}

    def announce(self, module: str) -> None:
        """Nothing: a model in memory is not read."""


class CheckpointParameters:
    """Parameters of a checkpoint, read from its files one module at a time; see :class:`Parameters`.

    Args:
        model: the causal LM of the checkpoint's configuration, on the meta device.
        checkpoint: its files.

    Attributes:
        unknown: names of tensors that the model has no place for.

    Raises:
        CompressionError: a parameter of the model is missing from the checkpoint.
        UnsupportedModelError: a tensor that transformers would fuse or split.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._owned = _own_parameters(model)
        names = map_names(model, checkpoint.names)
        self._names = dict(names.checkpoint_name)
        self.unknown = names.unknown
        self.modules = tuple(self._owned)
        head = output_head(model)
        self.tied = False
        for target, source in model.all_tied_weights_keys.items():
            shared = self._tie(target, source)
            self.tied = self.tied or (shared and target == f"{head}.weight")
        for names_of_module in self._owned.values():
            for full in names_of_module.values():
                if full not in self._names:
                    raise CompressionError(
                        f"{checkpoint.repo} has no tensor for {full} of {type(model).__name__}; the checkpoint is "
                        "incomplete or of another architecture than its config.json says."
                    )

    def _tie(self, target: str, source: str) -> bool:
        """Read two tied parameters from the one tensor stored; as in transformers, unless both are and differ."""
        if target in self._names and source in self._names:
            one, other = (self._checkpoint.tensor(self._names[name]) for name in (target, source))
            return torch.equal(one, other)
        stored = self._names.get(source, self._names.get(target))
        if stored is not None:
            self._names[target] = self._names[source] = stored
        return True

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters by name, from the files' headers."""
        return {name: self._checkpoint.shape(self._names[full]) for name, full in self._owned[module].items()}

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own parameters by name, on the CPU in the checkpoint's dtype, read from the files."""
        return {name: self._checkpoint.tensor(self._names[full]) for name, full in self._owned[module].items()}

    def announce(self, module: str) -> None:
        """Have the system fetch a module's parameters from the disk meanwhile."""
        for full in self._owned[module].values():
            self._checkpoint.announce(self._names[full])
