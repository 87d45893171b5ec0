"""Where the parameters of a base or an expert are read from: a checkpoint's files, or a live model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..delta_format.checkpoint import Checkpoint, resolve_checkpoint
from ..delta_format.header import parse_json
from ..delta_format.location import RepoLocation
from ..delta_format.spec import ADAPTER_CONFIG_NAME, PEFT_TYPE
from ..errors import CheckpointError, CompressionError, UnsupportedModelError
from .names import map_names

__all__ = [
    "CheckpointParameters",
    "LiveParameters",
    "Parameters",
    "Source",
    "check_unknown",
    "input_embedding",
    "locate",
    "meta_model",
    "output_head",
    "read_config",
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
        CheckpointError: a missing, truncated or unreadable file; the repo is an adapter or a delta.
        CompressionError: the checkpoint is quantised.
        UnsupportedModelError: the model comes with code of its own.
    """
    location, config = read_config(location)
    checkpoint = resolve_checkpoint(
        location.repo,
        location.revision,
        location.token,
        location.cache_dir,
        location.local_files_only,
        location.subfolder,
    )
    return Source(location, config, checkpoint)


def read_config(location: RepoLocation) -> tuple[RepoLocation, PreTrainedConfig]:
    """A checkpoint's configuration, and the repo at the commit that it is of; no weights are looked for.

    Raises:
        CheckpointError: a missing or unreadable file; the repo is an adapter or a delta.
        CompressionError: the checkpoint is quantised.
        UnsupportedModelError: the model comes with code of its own.
    """
    path = location.find("config.json")
    if path is None:
        _refuse_adapter(location)
        path = location.require("config.json")
    location = location.pinned(path)
    content = parse_json(path.read_bytes(), str(path), CheckpointError)
    if content.get("auto_map") and content.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{location} is of model_type {content.get('model_type')!r}, which transformers has no code for; the code "
            "in the repo is never run. Only architectures that transformers has itself are supported."
        )
    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a value that transformers did not foresee leads to
        raise CheckpointError(
            f"{path} cannot be read as a model's configuration: {type(error).__name__}: {error}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CompressionError(
            f"{location} is a quantised checkpoint (config.json has a quantization_config); deltas are formed between "
            "the checkpoints before quantisation."
        )
    return location, config


def _refuse_adapter(location: RepoLocation) -> None:
    """Say what a repo is that was taken for a full checkpoint."""
    path = location.find(ADAPTER_CONFIG_NAME)
    if path is None:
        return
    method = parse_json(path.read_bytes(), str(path), CheckpointError).get("peft_type")
    if method == PEFT_TYPE:
        raise CheckpointError(
            f"{location} is a delta repo, expected a full checkpoint with a config.json. Give the fine-tune that the "
            "delta was made from; or make a full checkpoint of the delta with meswitch merge."
        )
    raise CheckpointError(
        f"{location} is a PEFT adapter ({method}), expected a full checkpoint with a config.json. An adapter is small "
        "already; to have it as an expert, load it with PEFT, merge_and_unload() it and save_pretrained() what comes "
        "of that."
    )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal LM of a configuration without memory for its weights.

    Raises:
        CheckpointError: transformers cannot build a model of this configuration.
        UnsupportedModelError: transformers has no causal LM for the configuration.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"transformers has no causal LM of model_type {config.model_type!r}.")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a value that the modelling code did not foresee leads to
        raise CheckpointError(
            f"transformers cannot build the model that config.json describes (model_type {config.model_type!r}): "
            f"{type(error).__name__}: {error}"
        ) from error


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
        checkpoint: its files.
        unknown: names of tensors that the model has no place for.
        buffers: name in the model to name of the tensor, for what it has beside parameters.

    Raises:
        CompressionError: a parameter of the model is missing from the checkpoint, or has another shape there.
        UnsupportedModelError: a tensor that transformers would fuse or split.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._owned = _own_parameters(model)
        names = map_names(model, checkpoint.names)
        self._names = dict(names.checkpoint_name)
        self.unknown = names.unknown
        parameters = {full for owned in self._owned.values() for full in owned.values()}
        self.buffers = {name: stored for name, stored in self._names.items() if name not in parameters}
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
                stored, expected = checkpoint.shape(self._names[full]), tuple(model.get_parameter(full).shape)
                if stored != expected:
                    raise CompressionError(
                        f"{checkpoint.repo} has {full} of {type(model).__name__} with shape {stored}, but its "
                        f"config.json makes it {expected}. Correct the config.json, or give the checkpoint that it "
                        "belongs to."
                    )

    def _tie(self, target: str, source: str) -> bool:
        """Read two tied parameters from the one tensor stored; as in transformers, unless both are and differ."""
        if target in self._names and source in self._names:
            one, other = (self.checkpoint.tensor(self._names[name]) for name in (target, source))
            return torch.equal(one, other)
        stored = self._names.get(source, self._names.get(target))
        if stored is not None:
            self._names[target] = self._names[source] = stored
        return True

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's own parameters by name, from the files' headers."""
        return {name: self.checkpoint.shape(self._names[full]) for name, full in self._owned[module].items()}

    def of(self, module: str) -> dict[str, Tensor]:
        """A module's own parameters by name, on the CPU in the checkpoint's dtype, read from the files."""
        return {name: self.checkpoint.tensor(self._names[full]) for name, full in self._owned[module].items()}

    def stored_name(self, parameter: str) -> str:
        """What the checkpoint calls a parameter; a tied one may share its tensor.

        Args:
            parameter: its full name in the model.
        """
        return self._names[parameter]

    def announce(self, module: str) -> None:
        """Have the system fetch a module's parameters from the disk meanwhile."""
        for full in self._owned[module].values():
            self.checkpoint.announce(self._names[full])


def check_unknown(base: CheckpointParameters, expert: CheckpointParameters) -> None:
    """Tensors that are no parameters may be left out only if the expert's are the base's.

    Raises:
        UnsupportedModelError: naming the tensor.
    """
    ours, theirs = expert.checkpoint, base.checkpoint
    for name in (*expert.unknown, *expert.buffers.values()):
        if name not in theirs or not torch.equal(theirs.tensor(name), ours.tensor(name)):
            raise UnsupportedModelError(
                f"{ours.repo} has a tensor {name} that is no parameter of the causal LM and differs from the base's "
                "(or the base has none); a delta would lose it. Remove it from the checkpoint if it is not needed."
            )
