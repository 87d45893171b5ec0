"""Writing what a model holds: the active expert as a delta repo, or the whole as a family repo."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
import urllib.parse
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .cards import family_card, merge_card, write_delta_card
from .compression.assets import find_assets
from .compression.sources import meta_model
from .configuration import MESwitchExpertConfig, MESwitchFamilyConfig
from .delta_format.spec import KEY_PREFIX
from .delta_format.writer import write_delta
from .errors import ExpertNotFoundError, UnsupportedOperationError
from .hub import push_folder
from .inspection import dense_bytes

if TYPE_CHECKING:
    from .mixin import MESwitchMixin

__all__ = ["push_to_hub", "save_expert", "save_family", "save_pretrained"]

_CARD = "README.md"


def save_pretrained(
    model: MESwitchMixin,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    **kwargs: Any,
) -> None:
    """``model.save_pretrained``: the family if the model is one, else the active expert's delta.

    Raises:
        ExpertNotFoundError: no family, and no expert is active.
        UnsupportedOperationError: PEFT's key prefix switched off, which no delta reader would find.
    """
    if kwargs.pop("save_peft_format", True) is False:
        raise UnsupportedOperationError("save_peft_format=False is not supported: a delta repo is a PEFT repo.")
    if is_main_process:
        if model._meswitch_family is not None:
            save_family(model, save_directory, max_shard_size=max_shard_size)
        else:
            save_expert(model, save_directory, state_dict=state_dict, max_shard_size=max_shard_size)
    if push_to_hub:
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        push_folder(save_directory, repo_id, **_push_arguments(kwargs))


def push_to_hub(model: MESwitchMixin, repo_id: str, max_shard_size: int | str = "50GB", **kwargs: Any) -> str:
    """``model.push_to_hub``: save to a temporary folder, push it in one commit, return the commit's URL.

    Raises:
        UnsupportedOperationError: the family names a base by a path of this machine.
    """
    base = None if model._meswitch_family is None else str(model._meswitch_family.base_model_name_or_path)
    if base is not None and (base.startswith("./") or Path(base).exists()):
        raise UnsupportedOperationError(
            f"The family's base is the local folder {base!r}, which nobody else can load. Push the base first and "
            "load the family with its Hub id."
        )
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, max_shard_size=max_shard_size)
        return push_folder(folder, repo_id, **_push_arguments(kwargs)).commit_url


def _push_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known = ("private", "revision", "commit_message", "commit_description", "token", "create_pr", "tags")
    return {key: kwargs[key] for key in known if kwargs.get(key) is not None}


def save_expert(
    model: MESwitchMixin,
    save_directory: str | Path,
    expert: str | None = None,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write one expert as a delta repo, with its tokenizer, chat template, generation config and card.

    Args:
        model: a model with experts.
        save_directory: the folder.
        expert: the expert; the active one if `None`.
        state_dict: the model's state dict, where it had to be gathered by other means.
        max_shard_size: largest weight file.

    Raises:
        ExpertNotFoundError: not loaded, or none is active.
    """
    name = expert if expert is not None else model.active_expert
    if name is None:
        raise ExpertNotFoundError("No expert is active, so there is no delta to save; call set_expert() first.")
    config: MESwitchExpertConfig = model.peft_config[name]
    tensors = {f"{KEY_PREFIX}{key}": tensor for key, tensor in model.get_adapter_state_dict(name, state_dict).items()}
    info = model._meswitch_switch.experts[name]
    assets = [] if info.assets is None else find_assets(info.assets)
    own_card = None if info.files is None else info.files.asset(_CARD)
    kept = _existing_card(Path(save_directory)) or (own_card.read_text(encoding="utf-8") if own_card else None)
    directory = write_delta(
        save_directory,
        config,
        tensors,
        assets,
        texts={} if kept is None else {_CARD: kept},
        max_shard_size=max_shard_size,
    )
    write_delta_card(directory, config, dense_bytes=_dense_bytes(model, info.vocab_size))


def save_family(model: MESwitchMixin, save_directory: str | Path, *, max_shard_size: int | str = "50GB") -> None:
    """Write a family repo: where the base is, where each expert is, the tokenizer and the card.

    Experts from the Hub are named by id and commit; experts from this machine are written into ``experts/``.
    ``config.json`` is moved into place last.

    Raises:
        UnsupportedOperationError: the base is inside a family repo of the Hub, and has no name of its own.
    """
    family = model._meswitch_family
    assert family is not None
    folder = Path(save_directory)
    base = _base_reference(model, family, folder)
    folder.mkdir(parents=True, exist_ok=True)
    experts: dict[str, Any] = {}
    for name, info in sorted(model._meswitch_switch.experts.items()):
        location = None if info.files is None else info.files.location
        if info.files is not None and location is not None and not location.is_local:
            experts[name] = {"repo": info.files.repo, "revision": info.files.revision}
            if location.subfolder:
                experts[name]["subfolder"] = location.subfolder
        else:
            path = f"experts/{urllib.parse.quote(name, safe='-_.')}"
            save_expert(model, folder / path, name, max_shard_size=max_shard_size)
            experts[name] = {"repo": f"./{path}", "revision": None}
    config = MESwitchFamilyConfig(
        base,
        family.base_revision,
        experts,
        default_expert=model.active_expert,
        router=family.router,
        architectures=["MESwitchModelForCausalLM"],
    )
    staging = folder / f".{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        config.save_pretrained(staging)
        generation_config = copy.deepcopy(model.generation_config)  # type: ignore[attr-defined]
        # transformers drops attributes it does not know, `expert` among them, from configs derived from a model's.
        generation_config._from_model_config = False
        generation_config.save_pretrained(staging)
        with contextlib.suppress(OSError, ValueError):  # a base without a tokenizer gives a family without one
            model.tokenizer_for(None).save_pretrained(staging)
        kept, fresh = _existing_card(folder), family_card(config)
        (staging / _CARD).write_text(merge_card(kept, fresh) if kept else fresh, encoding="utf-8")
        for file in sorted(staging.iterdir(), key=lambda f: f.name == "config.json"):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def _existing_card(folder: Path) -> str | None:
    path = folder / _CARD
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _dense_bytes(model: Any, vocab_size: int) -> int:
    """Bytes of a full 16-bit copy of an expert."""
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = vocab_size
    return dense_bytes(meta_model(config))
