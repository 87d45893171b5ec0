"""Publishing a delta or family folder: one commit, and the repo's own model card is never lost."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from .cards import REPO_PLACEHOLDER, hub_id, merge_card, with_license, with_tags
from .delta_format.spec import ADAPTER_CONFIG_NAME
from .errors import DeltaFormatError

__all__ = ["push_folder"]

logger = logging.getLogger(__name__)

_CARD_NAME = "README.md"
_WEIGHT_FILE = re.compile(r"adapter_model.*\.(safetensors|safetensors\.index\.json|bin)")
#: How often a commit is tried again when somebody else's commit came in between.
_ATTEMPTS = 3
_PRECONDITION_FAILED = 412


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
) -> CommitInfo:
    """Upload a delta or family folder to the Hub in one commit, creating the repo and the branch where needed.

    Cards that are already in the repo are merged with the folder's (:func:`transformers_meswitch.cards.merge_card`),
    against the very commit that they were read from. Weight files of an earlier push that the folder no longer has
    (other shards) are deleted in the same commit. The folder itself is not changed.

    Args:
        folder: what ``save_pretrained`` or ``compress`` wrote.
        repo_id: ``"name"`` or ``"owner/name"``.
        private: visibility of a repo that is created; an existing repo keeps its own.
        revision: branch to commit to, created where missing; the default is ``main``.
        commit_message: first line of the commit's message.
        commit_description: the rest of the commit's message.
        tags: further tags for the card's metadata.
        token: Hub token; the default is the one stored by ``hf auth login``.
        create_pr: open a pull request instead of committing to the branch.

    Raises:
        DeltaFormatError: the folder holds neither a delta nor a family.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        raise DeltaFormatError(
            f"{folder} holds neither {ADAPTER_CONFIG_NAME} (a delta) nor config.json (a family); pass the folder that "
            "save_pretrained() or compress() wrote."
        )
    _warn_of_local_base(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        info = api.model_info(repo_id, revision=revision)
        remote = {sibling.rfilename for sibling in info.siblings or []}
        try:
            return api.create_commit(
                repo_id,
                _operations(api, folder, repo_id, info.sha, remote, tags),
                commit_message=commit_message or "Upload with transformers-meswitch",
                commit_description=commit_description,
                revision=revision,
                parent_commit=info.sha,
                create_pr=create_pr,
            )
        except HfHubHTTPError as error:
            moved = getattr(error.response, "status_code", None) == _PRECONDITION_FAILED
            if not moved or attempt == _ATTEMPTS - 1:
                raise
            logger.info(f"{repo_id} was updated during the push; merging again.")
    raise AssertionError("unreachable: the last attempt returns or raises")


def _operations(
    api: HfApi, folder: Path, repo_id: str, head: str | None, remote: set[str], tags: Sequence[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    local = {name: path for name, path in local.items() if not _is_hidden(name)}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name, path in local.items():
        content: Path | bytes = path
        if PurePosixPath(name).name == _CARD_NAME:
            card = path.read_text(encoding="utf-8-sig").replace(REPO_PLACEHOLDER, repo_id)
            card = with_tags(with_license(card, _inherited_license(api, path.parent)), tags)
            if name in remote:
                existing = Path(api.hf_hub_download(repo_id, name, revision=head)).read_bytes().decode("utf-8-sig")
                card = merge_card(existing, card)
            content = card.encode()
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    deltas = {PurePosixPath(name).parent for name in local if PurePosixPath(name).name == ADAPTER_CONFIG_NAME}
    for name in sorted(remote - set(local)):
        file = PurePosixPath(name)
        if file.parent in deltas and _WEIGHT_FILE.fullmatch(file.name):
            operations.append(CommitOperationDelete(path_in_repo=name))
    return operations


def _is_hidden(name: str) -> bool:
    """Files of tools (``.git``, ``.cache``), not of the model."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts) and name != ".gitattributes"


def _config(folder: Path) -> dict[str, Any]:
    path = next((p for n in (ADAPTER_CONFIG_NAME, "config.json") if (p := folder / n).is_file()), None)
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def _warn_of_local_base(folder: Path) -> None:
    base = _config(folder).get("base_model_name_or_path")
    # "./base" lies inside the repo.
    if base and not base.startswith("./") and hub_id(base) is None:
        logger.warning(
            f"The repo names its base by a path of this machine, {base!r}: nobody else can load it by its own id, and "
            "the path becomes public. Push the base, and compress against its Hub id."
        )


def _inherited_license(api: HfApi, folder: Path) -> dict[str, str]:
    """The licence of the expert, else of the base, as their own cards on the Hub state it."""
    config = _config(folder)
    for key in ("expert_model_name_or_path", "base_model_name_or_path"):
        origin = hub_id(config.get(key))
        if origin is None:
            continue
        try:
            card = api.model_info(origin).card_data
        except HfHubHTTPError as error:
            logger.info(f"The licence of {origin} is not known ({error}).")
            continue
        stated = card.to_dict() if card is not None else {}
        if stated.get("license"):
            return {k: stated[k] for k in ("license", "license_name", "license_link") if stated.get(k)}
    return {}
