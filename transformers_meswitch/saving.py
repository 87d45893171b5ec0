"""Writing what a model holds: the active expert as a delta repo, or the whole as a family repo."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin

from .cards import family_card, hub_id, merge_card, read_card, write_delta_card
from .compression.assets import GENERATION_CONFIG, find_assets
from .configuration import MESwitchExpertConfig, MESwitchFamilyConfig
from .delta_format.asset_files import ASSETS, TEMPLATE_FOLDER, stale_assets
from .delta_format.folder_lock import FolderLock
from .delta_format.header import parse_json
from .delta_format.reader import DeltaFiles, open_delta, resolve_delta
from .delta_format.spec import ADAPTER_CONFIG_NAME, EVIDENCE_NAME, FORMAT_VERSION, KEY_PREFIX
from .delta_format.writer import write_delta
from .errors import ExpertNotFoundError, OutputFolderError, UnsupportedOperationError
from .families.folder import CONFIG, EXPERTS, check_family_folder, expert_folder, install, staging_folder
from .families.remote_code import AUTO_MAP, write_stub
from .generation import AUTO
from .hub import inner_deltas, push_folder
from .inspection import full_copy_bytes
from .peft_method.naming import known_expert
from .routing.files import ROUTER_FILES
from .routing.loading import Router
from .routing.output import BASE_LABEL
from .verification.evidence import evidence_text_for

if TYPE_CHECKING:
    from .mixin import MESwitchMixin

__all__ = ["push_to_hub", "put_router", "save_expert", "save_family", "save_pretrained"]

_CARD = "README.md"
_PUSH_ARGUMENTS = ("private", "revision", "commit_message", "commit_description", "token", "create_pr", "tags")


def save_pretrained(
    model: MESwitchMixin,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    **kwargs: Any,
) -> None:
    """``model.save_pretrained``: the family if the model is one, else the active expert's delta.

    The arguments are transformers'. ``save_original_format`` means nothing for a delta, which has one format.

    Raises:
        ExpertNotFoundError: no family, and no expert is active.
        TypeError: an argument that neither transformers' ``save_pretrained`` nor its ``push_to_hub`` has.
        UnsupportedOperationError: an argument that would give files which no delta reader finds (PEFT's key prefix
            switched off, a variant, a distributed checkpoint); or pushing what names a folder of this machine.
    """
    _check_known("save_pretrained", kwargs, ("repo_id", *_PUSH_ARGUMENTS))
    refused = {
        "save_peft_format": not save_peft_format,
        "variant": variant is not None,
        "distributed_checkpoint": distributed_checkpoint,
    }
    for argument in (name for name, given in refused.items() if given):
        raise UnsupportedOperationError(
            f"save_pretrained({argument}=) is not supported: a delta repo is a PEFT repo, under PEFT's names. Leave "
            "it out."
        )
    if push_to_hub:
        _check_base(model)
    if is_main_process:
        if model._meswitch_family is not None:
            save_family(model, save_directory, max_shard_size=max_shard_size)
        else:
            save_expert(model, save_directory, state_dict=state_dict, max_shard_size=max_shard_size)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
            push_folder(save_directory, repo_id, **_push_arguments({**kwargs, "token": token}))


def push_to_hub(model: MESwitchMixin, repo_id: str, max_shard_size: int | str = "50GB", **kwargs: Any) -> str:
    """``model.push_to_hub``: save to a temporary folder, push it in one commit, return the commit's URL.

    Raises:
        ExpertNotFoundError: no family, and no expert is active.
        TypeError: an argument that transformers' ``push_to_hub`` has not.
        UnsupportedOperationError: the base is a folder of this machine.
    """
    _check_known("push_to_hub", kwargs, _PUSH_ARGUMENTS)
    _check_base(model)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, max_shard_size=max_shard_size)
        return push_folder(folder, repo_id, **_push_arguments(kwargs)).commit_url


def _check_known(call: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given.keys() - known:
        raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


def _push_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in _PUSH_ARGUMENTS if kwargs.get(key) is not None}


def _check_base(model: MESwitchMixin) -> None:
    """Refuse a local base before anything is written; :func:`push_folder` looks at what was."""
    if model._meswitch_family is not None:
        base = str(model._meswitch_family.base_model_name_or_path)
        if hub_id(base) is None:
            raise UnsupportedOperationError(
                f"The family's base is the local folder {base!r}, which nobody else can load. Push the base first and "
                "load the family with its Hub id."
            )


def save_expert(
    model: MESwitchMixin,
    save_directory: str | Path,
    expert: str | None = None,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write one expert as a delta repo, with its tokenizer, chat template, generation config and card.

    Evidence (``meswitch verify --save``) goes along if it is of the very tensors that are written.

    Args:
        model: a model with experts.
        save_directory: the folder.
        expert: the expert; the active one if `None`.
        state_dict: the model's state dict, where it had to be gathered by other means.
        max_shard_size: largest weight file.

    Raises:
        ExpertNotFoundError: not loaded, or none is active.
        OutputFolderError: the folder holds a full model or a family, or is being written by somebody else.
    """
    name = expert if expert is not None else model._meswitch_switch.chosen_expert
    if name is None:
        raise ExpertNotFoundError("No expert is active, so there is no delta to save; call set_expert() first.")
    config = _published(model, model.peft_config[name])
    info = model._meswitch_switch.experts[name]
    tensors = _tensors(model, name, info.files, state_dict)
    assets = [] if info.assets is None else find_assets(info.assets)
    card = Path(save_directory, _CARD)
    if not card.is_file() and info.files is not None:
        card = info.files.asset(_CARD) or card
    kept = read_card(card)
    evidence = None if info.files is None else evidence_text_for(info.files.asset(EVIDENCE_NAME), tensors)
    texts = {name: text for name, text in ((_CARD, kept), (EVIDENCE_NAME, evidence)) if text is not None}
    generation_config = _own_generation_config(model, name, assets)
    if generation_config is not None:
        assets = [path for path in assets if path.name != GENERATION_CONFIG]
        texts[GENERATION_CONFIG] = generation_config
    directory = write_delta(save_directory, config, tensors, assets, texts=texts, max_shard_size=max_shard_size)
    dense = full_copy_bytes(
        dataclasses.replace(config, vocab_size=info.vocab_size),
        model.config,  # type: ignore[attr-defined]
    )
    write_delta_card(directory, config, dense_bytes=dense)


def _tensors(
    model: MESwitchMixin, expert: str, files: DeltaFiles | None, state_dict: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """An expert's tensors, keyed as on disk; of a model without an output head, from where the expert was loaded."""
    try:
        tensors = model.get_adapter_state_dict(expert, None if state_dict is None else dict(state_dict))
    except UnsupportedOperationError:
        if files is None:
            raise
        return open_delta(files).tensors()
    return {f"{KEY_PREFIX}{key}": tensor for key, tensor in tensors.items()}


def _own_generation_config(model: Any, expert: str, assets: Collection[Path]) -> str | None:
    """The text of an expert's generation config where no file among its assets says the same."""
    path = next((path for path in assets if path.name == GENERATION_CONFIG), None)
    # Of an expert that was compressed from a checkpoint without the file.
    derived = model._meswitch_switch.experts[expert].generation_config if path is None else None
    if model._meswitch_switch.generation_config_of != expert or not isinstance(model, GenerationMixin):
        return derived
    current = copy.deepcopy(model.generation_config)
    current.__dict__.pop("expert", None)  # names an expert of the program, which a delta repo knows nothing of
    if path is not None:
        return None if GenerationConfig.from_pretrained(path.parent) == current else current.to_json_string()
    edited = derived is None or GenerationConfig.from_dict(json.loads(derived)) != current
    return current.to_json_string() if edited else derived


def _published(model: MESwitchMixin, config: MESwitchExpertConfig) -> MESwitchExpertConfig:
    """The expert's config in today's format version; the base by its Hub id if that is known, else by its folder."""
    changes: dict[str, Any] = {
        "expert_model_name_or_path": hub_id(config.expert_model_name_or_path),
        # What an earlier version can hold means the same in this one.
        "format_version": FORMAT_VERSION,
    }
    name, base = str(model.name_or_path), config.base_model_name_or_path
    if hub_id(base) is None:
        if hub_id(name) and not _download(model).get("subfolder"):
            changes |= {"base_model_name_or_path": name, "revision": _base_commit(model)}
        elif not Path(str(base)).is_absolute() and Path(name).is_dir():
            # It was relative to where the delta was, and is not to where it is written.
            changes["base_model_name_or_path"] = str(Path(name).resolve())
    return dataclasses.replace(config, **changes)


def _download(model: MESwitchMixin) -> dict[str, Any]:
    return model._meswitch_switch.base_download


def _base_commit(model: Any) -> str | None:
    """The commit that the base came from; `None` for a folder."""
    return _download(model).get("revision") or getattr(model.config, "_commit_hash", None)


def save_family(model: MESwitchMixin, save_directory: str | Path, *, max_shard_size: int | str = "50GB") -> None:
    """Write a family repo: where the base is, where each expert is, the router, the tokenizer and the card.

    A base and experts from the Hub are named by id and commit; experts from this machine are written into
    ``experts/``. All is written beside the old family first; then ``config.json`` is removed, the new files are moved
    into place, deltas that only the old family named are removed, and ``config.json`` comes last.

    Raises:
        OutputFolderError: the folder holds a model that is no family, or is being written by somebody else.
        UnsupportedOperationError: the base is inside a family repo of the Hub, and has no name of its own.
    """
    family = model._meswitch_family
    assert family is not None
    # Experts that were deleted are no longer among those it can pick.
    router = None if model.router is None else model.router.only([BASE_LABEL, *model.experts])
    _check_default_expert(model, router)
    folder = Path(save_directory)
    base = _base_reference(model, family, folder)
    check_family_folder(folder)
    with staging_folder(folder) as staging:
        experts: dict[str, Any] = {}
        written: dict[str, str] = {}
        for name, info in sorted(model._meswitch_switch.experts.items()):
            location = None if info.files is None else info.files.location
            if info.files is not None and location is not None and not location.is_local:
                experts[name] = {"repo": info.files.repo, "revision": info.files.revision}
                if location.subfolder:
                    experts[name]["subfolder"] = location.subfolder
            else:
                path = expert_folder(name, written.values())
                if (folder / path).is_dir():
                    shutil.copytree(folder / path, staging / path, ignore=_written_by_us)
                save_expert(model, staging / path, name, max_shard_size=max_shard_size)
                experts[name] = {"repo": f"./{path}", "revision": None}
                written[name] = path
        config = MESwitchFamilyConfig(
            base,
            _base_commit(model) if hub_id(base) else None,
            experts,
            default_expert=model._meswitch_switch.chosen_expert,
            router=None if router is None else {"router_type": router.router_type},
            base_subfolder=family.base_subfolder,
            base_quantization=_base_quantization(model),
            architectures=["MESwitchModelForCausalLM"],
            auto_map=AUTO_MAP,
        )
        config.save_pretrained(staging)
        write_stub(staging)
        if router is not None:
            router.save_pretrained(staging)
        if isinstance(model, GenerationMixin):
            generation_config = copy.deepcopy(model.generation_config)
            # transformers drops attributes it does not know, `expert` among them, from configs derived from a model's.
            generation_config._from_model_config = False
            generation_config.save_pretrained(staging)
        with contextlib.suppress(OSError, ValueError):  # a base without a tokenizer gives a family without one
            model.tokenizer_for(None).save_pretrained(staging)
        kept, fresh = read_card(folder / _CARD), family_card(config)
        if kept is not None or not (folder / _CARD).exists():
            (staging / _CARD).write_text(merge_card(kept, fresh) if kept else fresh, encoding="utf-8")
        fresh_files = {file.relative_to(staging).as_posix() for file in staging.rglob("*")}
        gone = [folder / name for name in ROUTER_FILES - fresh_files if (folder / name).exists()]
        stale = [*stale_assets(folder, fresh_files), *gone]
        install(staging, written.values(), removed=inner_deltas(folder), stale=stale)
    _read_from(model, folder, written)


def put_router(router: Router, folder: str | Path) -> None:
    """Put a router into a family repo in a folder, or in place of the one it has; all else stays as it is.

    Raises:
        OutputFolderError: the folder holds no family, or is being written by somebody else.
    """
    folder = Path(folder)
    check_family_folder(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise OutputFolderError(f"{folder} has no {CONFIG}, so it is no family. Save the family there first.")
    lock = FolderLock(folder)
    try:
        router.save_pretrained(folder)
        config = MESwitchFamilyConfig.from_pretrained(folder)
        config.router = {"router_type": router.router_type}
        content = parse_json(path.read_bytes(), str(path)) | {"router": config.router}
        unfinished = folder / f".{CONFIG}"
        unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        unfinished.replace(path)
        kept, fresh = read_card(folder / _CARD), family_card(config)
        if kept is not None:
            (folder / _CARD).write_text(merge_card(kept, fresh), encoding="utf-8")
    finally:
        lock.release()


def _base_quantization(model: Any) -> dict[str, Any] | None:
    """How the base is quantised (with bitsandbytes: others are refused), as JSON has it."""
    quantizer = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else json.loads(quantizer.quantization_config.to_json_string(use_diff=True))


def _check_default_expert(model: Any, router: Router | None) -> None:
    """Refuse a family whose generation defaults name an expert it has not: every call would fail once it is loaded."""
    named = getattr(getattr(model, "generation_config", None), "expert", None)
    for name in [named] if named is None or isinstance(named, str) else named:
        if name == AUTO and router is not None:
            continue
        try:
            known_expert(name, model._meswitch_switch.experts)
        except ExpertNotFoundError as error:
            raise ExpertNotFoundError(
                f"model.generation_config.expert names an expert that the family has not; set it anew, or delete the "
                f"attribute. {error}"
            ) from error


def _written_by_us(_: str, names: list[str]) -> set[str]:
    """Of the files of a delta repo, those that saving replaces, so that none of an earlier expert is left over."""
    ours = {ADAPTER_CONFIG_NAME, EVIDENCE_NAME, *ASSETS, TEMPLATE_FOLDER}
    return {n for n in names if n in ours or n.startswith(("adapter_model", ".")) or n.endswith(".index.json")}


def _read_from(model: MESwitchMixin, folder: Path, written: Mapping[str, str]) -> None:
    """Experts that were read from a folder which is now saved over find their tokenizers where they are now."""
    switch = model._meswitch_switch
    for name, path in written.items():
        assets = switch.experts[name].assets
        if assets is None or not assets.is_local:
            continue
        if Path(assets.repo, assets.subfolder or "").resolve().is_relative_to((folder / EXPERTS).resolve()):
            files = resolve_delta(folder / path)
            switch.experts[name] = dataclasses.replace(switch.experts[name], files=files, assets=files.location)


def _base_reference(model: MESwitchMixin, family: MESwitchFamilyConfig, folder: Path) -> str | None:
    """The base as ``config.json`` in ``folder`` names it; ``./path`` means something else in every folder."""
    base = family.base_model_name_or_path
    if base is None or not base.startswith("./"):
        return base
    source = Path(str(model._meswitch_source))
    if not source.is_dir():
        raise UnsupportedOperationError(
            f"The base is inside the family repo {str(source)!r} and cannot be named from another. Load the base from "
            "a repo of its own, with the experts under experts=, and save that."
        )
    return base if source.resolve() == folder.resolve() else str((source / base).resolve())
