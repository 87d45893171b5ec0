"""Deciding, before anything is touched, where an expert's deltas go in a model, and whether they may."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration import MESWITCH, MESwitchExpertConfig
from ..delta_format.checkpoint import Checkpoint, resolve_checkpoint
from ..delta_format.fingerprint import compare_fingerprints, fingerprint_checkpoint
from ..delta_format.location import RepoLocation
from ..delta_format.reader import DeltaFiles
from ..delta_format.spec import LEAF_PREFIX, AnyRowsRecord, LinearRecord, ModuleRecord, ValuesRecord
from ..delta_format.validate import check_config
from ..errors import (
    BaseMismatchError,
    DeltaFormatError,
    MESwitchError,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from ..module_kinds import is_linear, linear_sizes
from .layer import MESwitchLayer
from .naming import check_expert_name
from .switch import ExpertInfo, ExpertSwitch

__all__ = [
    "Targets",
    "base_download",
    "base_vocab_size",
    "check_base",
    "expert_info",
    "plan_injection",
    "require_gradients",
    "switch_of",
    "wrapped_layers",
]

#: Module name in the model at hand to the record stored for it; `None` marks a head tied to the embedding.
Targets = dict[str, ModuleRecord | None]

_QUANTISED_BASES = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


def switch_of(model: nn.Module) -> ExpertSwitch | None:
    """The model's expert switch, or `None` if it never had an expert."""
    return model.__dict__.get("_meswitch_switch")


def wrapped_layers(model: nn.Module) -> dict[str, MESwitchLayer]:
    """Wrapped layers by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MESwitchLayer)}


def require_gradients(model: Any, requires_grad: bool) -> Any:
    """``model.requires_grad_()`` but for the deltas, whose codes are integers."""
    for name, parameter in model.named_parameters():
        if f".{LEAF_PREFIX}." not in name:
            parameter.requires_grad_(requires_grad)
    return model


def base_vocab_size(model: PreTrainedModel) -> int:
    """Rows of the base's input embedding."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, MESwitchLayer):
        embedding = embedding.get_base_layer()
    return int(embedding.num_embeddings)


def expert_info(config: MESwitchExpertConfig, model: PreTrainedModel) -> ExpertInfo:
    """What the switch must know of the expert that a config describes."""
    return ExpertInfo(
        vocab_size=config.vocab_size if config.vocab_size is not None else base_vocab_size(model),
        eos_token_id=tuple(config.eos_token_id or ()),
        pad_token_id=config.pad_token_id,
        tied=bool(
            model.config.tie_word_embeddings if config.tie_word_embeddings is None else config.tie_word_embeddings
        ),
    )


def plan_injection(
    model: nn.Module, config: MESwitchExpertConfig, name: str, peft_configs: Mapping[str, Any]
) -> Targets:
    """Check an expert against a model and say which module receives which record. Changes nothing.

    Args:
        model: the model that would receive the expert.
        config: its ``adapter_config.json``.
        name: the name it would have.
        peft_configs: configs of the adapters on the model; the new one may be among them.

    The checkpoint's bytes are compared when the tensors arrive (:func:`check_base`).

    Raises:
        DeltaFormatError: a malformed config, or one that contradicts itself or the base's vocabulary.
        ExpertNameError: the name is reserved, taken, or collides with a module.
        BaseMismatchError: another architecture, a module that the model lacks, another shape.
        UnsupportedOperationError: training, or another PEFT method on the same model.
        UnsupportedModelError: a quantisation other than bitsandbytes, offload, not a transformers model.
    """
    records = check_config(config)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Deltas attach to a transformers model, got {type(model).__name__}. Load the base with "
            "AutoModelForCausalLM."
        )
    if not config.inference_mode:
        raise UnsupportedOperationError(
            "Deltas are quantised and cannot be trained: is_trainable=True is not supported. Fine-tune the full "
            "expert and compress it again, or load the delta without is_trainable."
        )
    others = sorted({str(c.peft_type.value) for n, c in peft_configs.items() if n != name and c.peft_type != MESWITCH})
    if others:
        raise UnsupportedOperationError(
            f"The model already carries adapters of type {', '.join(others)}. An expert is a complete fine-tune and "
            "cannot be attached beside them; load the base again without them."
        )
    switch = switch_of(model)
    taken = switch.experts if switch else ()
    check_expert_name(name, taken, (module for module, _ in model.named_modules()))
    if switch is not None and switch.merged is not None:
        raise UnsupportedOperationError(
            f"Expert {switch.merged!r} is merged into the base weights; call unmerge_adapter() before loading "
            f"{name!r}."
        )
    _check_placement(model)
    _check_architecture(model, config)
    targets = _match_modules(model, config, records)
    _check_vocabulary(model, config, targets)
    _check_weights_at_hand(model, targets)
    return targets


def _check_placement(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = str(
            getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method)
        )
        if method not in _QUANTISED_BASES:
            raise UnsupportedModelError(
                f"The base is quantised with {method!r}; deltas run over bf16, fp16, fp32 and bitsandbytes 4/8-bit "
                "bases. Load the base in one of those."
            )
    device_map = {module: str(device) for module, device in (getattr(model, "hf_device_map", None) or {}).items()}
    # Beside an accelerator, accelerate keeps the CPU's modules there only between their calls.
    offloading = {"disk"} if set(device_map.values()) <= {"cpu", "disk", "mps"} else {"cpu", "disk"}
    for place in sorted(offloading & set(device_map.values()), reverse=True):
        offloaded = sorted(module for module, device in device_map.items() if device == place)
        raise UnsupportedModelError(
            f"{len(offloaded)} modules of the base are offloaded to {place} ({offloaded[0]!r} first), which deltas do "
            f"not support. Load with a device_map without {place!r}."
        )


def _check_architecture(model: PreTrainedModel, config: MESwitchExpertConfig) -> None:
    found = {model.config.model_type, getattr(model.config.get_text_config(), "model_type", None)}
    if config.base_model_type is not None and config.base_model_type not in found:
        raise BaseMismatchError(
            f"This delta belongs to a {config.base_model_type!r} base ({config.base_model_name_or_path}), but the "
            f"model is a {model.config.model_type!r} ({model.name_or_path or 'unnamed'}). Load the delta's own base."
        )


def _local_name(stored: str, modules: Mapping[str, nn.Module], model: PreTrainedModel) -> str | None:
    """Name of a stored module in this model: the same, or without the prefix that ``AutoModel`` drops."""
    if stored in modules:
        return stored
    stripped = stored.removeprefix(f"{model.base_model_prefix}.")
    return stripped if stripped != stored and stripped in modules else None


def _match_modules(
    model: PreTrainedModel, config: MESwitchExpertConfig, records: Mapping[str, ModuleRecord]
) -> Targets:
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    targets: Targets = {}
    for stored, record in records.items():
        local = _local_name(stored, modules, model)
        if local is None:
            is_head = isinstance(record, AnyRowsRecord) and not stored.startswith(f"{model.base_model_prefix}.")
            if head is None and is_head:
                continue
            raise BaseMismatchError(
                f"The delta changes {stored!r}, which {type(model).__name__} does not have. The delta belongs to "
                f"{config.base_model_name_or_path!r}; load that base."
            )
        _check_shape(stored, record, modules[local])
        targets[local] = record
    embedding = next((n for n, m in modules.items() if m is model.get_input_embeddings()), None)
    if head is not None and embedding in targets:
        head_name = next(n for n, m in modules.items() if m is head)
        targets.setdefault(head_name, None)
    return targets


def _check_vocabulary(model: PreTrainedModel, config: MESwitchExpertConfig, targets: Targets) -> None:
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    record = targets.get(embedding)
    rows = record.num_rows if isinstance(record, AnyRowsRecord) else base_vocab_size(model)
    if config.vocab_size not in (None, rows):
        raise DeltaFormatError(
            f"adapter_config.json: vocab_size is {config.vocab_size}, but the expert's {embedding} has {rows} rows. "
            "The delta repo is damaged or was edited; download it or compress the expert again."
        )
    pad = [] if config.pad_token_id is None else [config.pad_token_id]
    for field, ids in (("eos_token_id", config.eos_token_id or []), ("pad_token_id", pad)):
        unknown = [token for token in ids if token >= rows]
        if unknown:
            raise DeltaFormatError(
                f"adapter_config.json: {field} holds {unknown[0]}, expected ids from 0 to {rows - 1}. The delta repo "
                "is damaged or was edited; download it or compress the expert again."
            )


def _check_weights_at_hand(model: PreTrainedModel, targets: Targets) -> None:
    """Refuse modules whose weights are elsewhere between calls; a model wholly on ``meta`` by itself is a plan."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not hooked and all(parameter.is_meta for parameter in model.parameters()):
        return
    for name in targets:
        if any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            raise UnsupportedModelError(
                f"The weights of {name!r} are on the device 'meta': the base is offloaded, which deltas do not "
                "support. Load it onto devices that hold all of it, or quantise it with bitsandbytes."
            )


def _check_shape(name: str, record: ModuleRecord, module: nn.Module) -> None:
    base = module.get_base_layer() if isinstance(module, MESwitchLayer) else module
    found: Any
    expected: Any
    if isinstance(record, LinearRecord):
        found = linear_sizes(base) if is_linear(base) else None
        expected = (record.out_features, record.in_features)
    elif isinstance(record, AnyRowsRecord):
        is_rows = isinstance(base, nn.Embedding) or is_linear(base)
        weight = getattr(base, "weight", None)
        found = weight.shape[-1] if is_rows and weight is not None else None
        expected = record.width
    else:
        assert isinstance(record, ValuesRecord)
        own = {n: tuple(p.shape) for n, p in base.named_parameters(recurse=False)}
        found = {n: own.get(n) for n in record.shapes}
        expected = record.shapes
    if found != expected:
        raise BaseMismatchError(
            f"{name}: the delta was made for size {expected}, the base's {type(base).__name__} has {found}. The delta "
            "belongs to another base."
        )


def check_base(model: PreTrainedModel, config: MESwitchExpertConfig, files: DeltaFiles | None) -> None:
    """Compare the checkpoint that the base was loaded from with the one that the delta was formed against.

    Warns where the base has no files to read (a model built in memory, a GGUF file).

    Args:
        model: the model that the expert is attached to.
        config: the expert's ``adapter_config.json``.
        files: its delta repo, if it has one. The base may be in the same Hub cache.

    Raises:
        BaseMismatchError: names the first tensor that differs.
    """
    if config.base_fingerprint is None:
        return
    source = model.name_or_path
    try:
        if not source:
            raise FileNotFoundError("the model was built in memory")
        checkpoints = _base_checkpoints(model, config, files)
        found = [fingerprint_checkpoint(checkpoint.paths) for checkpoint in checkpoints]
    except (OSError, MESwitchError) as error:
        warnings.warn(
            f"The base {source or 'model'!r} has no checkpoint files to compare with the one this delta was made "
            f"against ({error}); only shapes were checked.",
            stacklevel=2,
        )
        return
    expected = config.base_fingerprint
    fitting = next((i for i, f in enumerate(found) if f["digest"] == expected.get("digest")), 0)
    if fitting and not _may_be_of(model, checkpoints[fitting], found[fitting]["tensors"], found[0]["tensors"]):
        fitting = 0
    at = checkpoints[fitting].revision
    if source == config.base_model_name_or_path and config.revision and at and at != config.revision:
        compare_fingerprints(
            expected,
            found[fitting],
            base=f"{source} at revision {at}",
            way_out=f"{source} was changed since: the delta was formed against its revision {config.revision}. Load "
            f"that, with revision={config.revision!r} (and adapter_kwargs={{'revision': 'main'}} where the delta is "
            "loaded by its id), or compress the expert again against this base.",
        )
    compare_fingerprints(expected, found[fitting], base=source)


def _may_be_of(
    model: PreTrainedModel, checkpoint: Checkpoint, own: Mapping[str, str], other: Mapping[str, str]
) -> bool:
    """Whether a model may have been loaded from a checkpoint rather than from another of the same repo.

    Args:
        model: the base.
        checkpoint: the one.
        own: its tensors' digests.
        other: digests of the other's.
    """
    parameters = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    for name in sorted(own):
        loaded = parameters.get(name)
        comparable = loaded is not None and loaded.is_floating_point() and not loaded.is_meta
        if own[name] != other.get(name) and comparable and loaded is not None:
            stored = checkpoint.tensor(name)
            return stored.shape == loaded.shape and bool(torch.equal(stored.to(loaded.dtype), loaded.detach().cpu()))
    return True  # quantised, or under names of the model's own


def base_download(model: PreTrainedModel, download: Mapping[str, Any]) -> dict[str, Any]:
    """How ``from_pretrained(delta)`` asked for the base: :attr:`~.switch.ExpertSwitch.base_download`.

    Args:
        model: the base.
        download: the arguments that transformers passes on to load the delta. It has mixed those of the base with
            ``adapter_kwargs``, which are the delta's alone; the base is where it left files.
    """
    kept = {key: download[key] for key in ("token", "cache_dir", "local_files_only") if download.get(key) is not None}
    # A plain string: transformers' own also knows the commit, but that of the delta repo.
    revision = getattr(model.config, "_commit_hash", None) or str(download.get("revision") or "main")
    folders, caches = ([download.get(key) or None, None] for key in ("subfolder", "cache_dir"))
    for place in itertools.product([revision, "main"], folders, caches):
        location = RepoLocation(model.name_or_path, place[0], place[1], cache_dir=place[2], local_files_only=True)
        with contextlib.suppress(MESwitchError):
            if location.find("config.json") is not None:
                where = {"revision": place[0], "subfolder": place[1], "cache_dir": place[2]}
                return {**kept, **{key: value for key, value in where.items() if value is not None}}
    return kept


def _base_checkpoints(
    model: PreTrainedModel, config: MESwitchExpertConfig, files: DeltaFiles | None
) -> list[Checkpoint]:
    """The base's files, which loading it left on this machine; several where its revision is not known.

    transformers does not say which cache, folder or revision a model came from, so these are tried in turn. The
    network is never used.
    """
    source, switch = model.name_or_path, switch_of(model)
    known = {} if switch is None else switch.base_download
    commit = known.get("revision") or getattr(model.config, "_commit_hash", None)
    location = None if files is None else files.location
    caches = dict.fromkeys([known.get("cache_dir"), None if location is None else location.cache_dir, None])
    folders = dict.fromkeys([known.get("subfolder") or None, None])
    # A family's loader knows which revision it asked for; of a model that a caller loaded it may be the delta's own.
    told = "revision" in known or (switch is not None and switch.keep)
    stated = None if told else config.revision_of(source)
    checkpoints, errors = [], []
    for revision in dict.fromkeys([commit, stated, None]):
        for cache_dir, subfolder in itertools.product(caches, folders):
            try:
                checkpoint = resolve_checkpoint(
                    source, revision=revision, cache_dir=cache_dir, subfolder=subfolder, local_files_only=True
                )
            except MESwitchError as error:
                errors.append(error)
                continue
            checkpoints.append(checkpoint)
            break
        if checkpoints and (commit is not None or checkpoints[0].revision is None):
            break
    if not checkpoints:
        raise errors[0]
    return checkpoints
