"""Publishing a delta or family folder: one commit, and the repo's own model card is never lost."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError

from .cards import REPO_PLACEHOLDER, hub_id, merge_card, read_card, with_license, with_tags
from .configuration import MESwitchFamilyConfig
from .delta_format.asset_files import is_asset
from .delta_format.location import is_plain_path
from .delta_format.reader import open_delta
from .delta_format.spec import ADAPTER_CONFIG_NAME, EVIDENCE_NAME
from .errors import DeltaFormatError, UnsupportedOperationError
from .hub_commit import Operation, commit
from .routing.files import ROUTER_CONFIG, ROUTER_FILES
from .verification.evidence import evidence_text_for

__all__ = ["inner_deltas", "inner_experts", "push_folder"]

logger = logging.getLogger(__name__)

_CARD_NAME, _CONFIG_NAME = "README.md", "config.json"
_CONFIGS = (ADAPTER_CONFIG_NAME, _CONFIG_NAME)
_WEIGHT_FILE = re.compile(r"adapter_model.*\.(safetensors|safetensors\.index\.json|bin)")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
) -> CommitInfo:
    """Upload a delta or family folder to the Hub in one commit, creating the repo and the branch where needed.

    Cards that are already in the repo are merged with the folder's (:func:`transformers_meswitch.cards.merge_card`),
    against the very commit that they were read from; one that is no text is left alone. Weight files, evidence,
    tokenizer files and chat templates of an earlier push that the delta no longer has, the router that a family no
    longer has, and experts that only the earlier push's family named, are deleted in the same commit. Left out are
    hidden files, models that the folder's config does not name (``checkpoint-500/``), and evidence of other tensors
    than those beside it. The folder itself is not changed.

    Args:
        folder: what ``save_pretrained`` or ``compress`` wrote.
        repo_id: ``"name"`` or ``"owner/name"``.
        private: visibility of a repo that is created; an existing repo keeps its own.
        revision: branch to commit to, created where missing (but not to open a pull request against); the default is
            ``main``.
        commit_message: first line of the commit's message.
        commit_description: the rest of the commit's message.
        tags: further tags for the card's metadata.
        token: Hub token; the default is the one stored by ``hf auth login``.
        create_pr: open a pull request instead of committing to the branch. The repo may be somebody else's.
        parent_commit: push onto this commit only; by default onto whatever the branch has.

    Raises:
        DeltaFormatError: the folder holds neither a delta nor a family.
        UnsupportedOperationError: a config in it names a base or an expert by a path of this machine; or ``revision``
            is a tag or a commit; or the folder is a family, and the repo a full model.
        ValueError: the Hub refused a card's metadata or a large file.
        huggingface_hub.errors.HTTPError: the Hub refused (:class:`~huggingface_hub.errors.HfHubHTTPError`) or could
            not be reached; see :func:`~transformers_meswitch.hub_commit.commit`.
    """
    folder = Path(folder)
    is_delta = (folder / ADAPTER_CONFIG_NAME).is_file()
    if not is_delta and not (folder / "config.json").is_file():
        raise DeltaFormatError(
            f"{folder} holds neither {ADAPTER_CONFIG_NAME} (a delta) nor config.json (a family); pass the folder that "
            "save_pretrained() or compress() wrote."
        )
    if not is_delta and _json(folder / "config.json").get("model_type") != MESwitchFamilyConfig.model_type:
        raise DeltaFormatError(
            f"{folder} holds a full model, neither a delta nor a family; push the model with its own push_to_hub, or "
            "compress it and push the delta."
        )
    for path in _files(folder).values():
        if path.name in _CONFIGS:
            _check_portable(path)
        asked = _json(path).get("repo") if path.name == ROUTER_CONFIG else None
        if asked is not None and hub_id(str(asked)) is None:
            raise UnsupportedOperationError(
                f"{path} names the language model {asked!r}, a path of this machine that nobody else "
                "can load. Push the model, and name it by its Hub id: MultipleChoiceRouter(..., repo=...)."
            )
    local = {name: path for name, path in _files(folder).items() if _is_true(path)}
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    license_of = cache(lambda origin: _stated_license(api, origin))
    return commit(
        api,
        repo_id,
        lambda info: _operations(api, folder, local, repo_id, info, tags, license_of),
        revision=revision,
        create_pr=create_pr,
        parent_commit=parent_commit,
        commit_message=commit_message or "Upload with transformers-meswitch",
        commit_description=commit_description,
    )


def _operations(
    api: HfApi,
    folder: Path,
    local: Mapping[str, Path],
    repo_id: str,
    info: ModelInfo,
    tags: Sequence[str],
    license_of: Callable[[str], dict[str, str]],
) -> list[Operation]:
    head, remote = info.sha, {sibling.rfilename for sibling in info.siblings or []}
    dropped: set[str] = set()
    if _CONFIG_NAME in remote and _CONFIG_NAME in local:
        earlier = _json(Path(api.hf_hub_download(repo_id, _CONFIG_NAME, revision=head)))
        _check_no_other_model(earlier, _json(local[_CONFIG_NAME]), repo_id)
        dropped = inner_experts(earlier) - inner_experts(_config(folder))
    operations: list[Operation] = []
    for name, path in local.items():
        content: Path | bytes = path
        if PurePosixPath(name).name == _CARD_NAME:
            there = read_card(Path(api.hf_hub_download(repo_id, name, revision=head))) if name in remote else None
            card = read_card(path)
            if card is None or (there is None and name in remote):
                continue
            card = card.replace(REPO_PLACEHOLDER, repo_id)
            card = with_tags(with_license(card, _inherited_license(path.parent, license_of)), tags)
            content = (card if there is None else merge_card(there, card)).encode()
        elif PurePosixPath(name).name == ADAPTER_CONFIG_NAME:
            content = _without_local_expert(path)
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    deltas = {PurePosixPath(name).parent for name in local if PurePosixPath(name).name == ADAPTER_CONFIG_NAME}
    for name in sorted(remote - set(local)):
        file = PurePosixPath(name)
        stale = any(_is_ours(file.relative_to(delta)) for delta in deltas if file.is_relative_to(delta))
        stale = stale or (_CONFIG_NAME in local and name in ROUTER_FILES)
        if stale or any(PurePosixPath(path) in file.parents for path in dropped):
            operations.append(CommitOperationDelete(path_in_repo=name))
    return operations


def _is_ours(file: PurePosixPath) -> bool:
    """Whether a file of a delta repo is one that a new push replaces or does without."""
    return str(file) == EVIDENCE_NAME or bool(_WEIGHT_FILE.fullmatch(str(file))) or is_asset(str(file))


def _is_hidden(name: str) -> bool:
    """Files of tools (``.git``, ``.cache``, ``__pycache__`` beside a family's line of code), not of the model."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part == "__pycache__" for part in parts) and name != ".gitattributes"


def _files(folder: Path) -> dict[str, Path]:
    """Name in the repo to file, of all that belongs: a model in a subfolder does if the folder's config names it."""
    config = _config(folder)
    named = _inner_references(config)
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base.startswith("./"):
        named.add(base[2:].rstrip("/"))
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = PurePosixPath(path.relative_to(folder).as_posix())
        models = [parent for parent in name.parents[:-1] if any((folder / parent / c).is_file() for c in _CONFIGS)]
        belongs = all(any(model.is_relative_to(inner) for inner in named) for model in models)
        if belongs and path.is_file() and not _is_hidden(str(name)):
            found[str(name)] = path
    return found


def _is_true(path: Path) -> bool:
    """False of evidence alone, where it is not of the delta beside it: other tools may have replaced the weights."""
    if path.name != EVIDENCE_NAME or not (path.parent / ADAPTER_CONFIG_NAME).is_file():
        return True
    return evidence_text_for(path, open_delta(path.parent).tensors()) is not None


def _config(folder: Path) -> dict[str, Any]:
    path = next((p for n in _CONFIGS if (p := folder / n).is_file()), None)
    return _json(path) if path else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DeltaFormatError(f"{path} is not JSON ({error}); write the folder again.") from error
    return content if isinstance(content, dict) else {}


def _references(config: Mapping[str, Any]) -> list[str]:
    """Repos of a family's experts as its ``config.json`` names them."""
    experts = config.get("experts")
    entries = experts.values() if isinstance(experts, dict) else ()
    return [str(entry.get("repo") if isinstance(entry, dict) else entry) for entry in entries]


def _inner_references(config: Mapping[str, Any]) -> set[str]:
    inside = {repo[2:].rstrip("/") for repo in _references(config) if repo.startswith("./")}
    return {path for path in inside if is_plain_path(path)}


def inner_experts(config: Mapping[str, Any]) -> set[str]:
    """Delta repos in ``experts/`` that a family's ``config.json`` names, as ``experts/<folder>``."""
    return {path for path in _inner_references(config) if PurePosixPath(path).parent == PurePosixPath("experts")}


def inner_deltas(folder: Path) -> set[str]:
    """Delta repos in ``experts/`` that the family in a folder names, as ``experts/<folder>``."""
    path = folder / _CONFIG_NAME
    config = _json(path) if path.is_file() else {}
    return {path for path in inner_experts(config) if (folder / path / ADAPTER_CONFIG_NAME).is_file()}


def _check_portable(path: Path) -> None:
    """Refuse a delta's or family's config that names what is on this machine only."""
    config = _json(path)
    base = config.get("base_model_name_or_path")
    is_family = path.name == _CONFIG_NAME
    inside = is_family and isinstance(base, str) and base.startswith("./") and (path.parent / base).is_dir()
    if base is not None and not inside and hub_id(str(base)) is None:
        raise UnsupportedOperationError(
            f"{path} names the base {base!r}, a path of this machine: nobody else can load it, and the path would "
            "become public. Push the base, load it by its Hub id with the delta as an expert, and push that."
        )
    for repo in _references(config) if is_family else ():
        if hub_id(repo) is None and not (repo.startswith("./") and (path.parent / repo).is_dir()):
            raise UnsupportedOperationError(
                f"{path} names the expert {repo!r}, a path of this machine that nobody else can load. Load the family "
                "and save it: experts from folders are then written into it."
            )


def _check_no_other_model(earlier: Mapping[str, Any], config: Mapping[str, Any], repo_id: str) -> None:
    """Refuse a family in place of a full model, as saving over one's folder is: its weights would load no longer."""
    kind, family = earlier.get("model_type"), MESwitchFamilyConfig.model_type
    if config.get("model_type") == family and kind not in (None, family):
        raise UnsupportedOperationError(
            f"{repo_id} holds the config.json of a model that is no family (model_type {kind!r}); pushing a family to "
            "it would destroy it. Give another id."
        )


def _without_local_expert(path: Path) -> Path | bytes:
    """The ``adapter_config.json``, where need be without the folder that the fine-tune was in."""
    config = _json(path)
    if config.get("expert_model_name_or_path") is None or hub_id(str(config["expert_model_name_or_path"])):
        return path
    return (json.dumps({**config, "expert_model_name_or_path": None}, indent=2, sort_keys=True) + "\n").encode()


def _inherited_license(folder: Path, license_of: Callable[[str], dict[str, str]]) -> dict[str, str]:
    """The licence of the expert, else of the base, as their own cards on the Hub state it."""
    config = _config(folder)
    for key in ("expert_model_name_or_path", "base_model_name_or_path"):
        origin = hub_id(config.get(key))
        stated = {} if origin is None else license_of(origin)
        if stated:
            return stated
    return {}


def _stated_license(api: HfApi, origin: str) -> dict[str, str]:
    try:
        card = api.model_info(origin).card_data
    except HfHubHTTPError as error:
        logger.info(f"The licence of {origin} is not known ({error}).")
        return {}
    stated = card.to_dict() if card is not None else {}
    return {
        k: stated[k] for k in ("license", "license_name", "license_link") if stated.get("license") and stated.get(k)
    }
