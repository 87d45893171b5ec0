"""Making a family, and adding and removing experts, in a folder or in a repo of the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..cards import family_card, merge_card, read_card
from ..compression.assets import find_assets
from ..compression.expert_config import portable_name
from ..compression.sources import meta_model, read_config
from ..configuration import MESwitchFamilyConfig, reference_in_family
from ..delta_format.asset_files import GENERATION_CONFIG, is_template
from ..delta_format.location import RepoLocation
from ..errors import (
    DeltaFormatError,
    ExpertNotFoundError,
    MESwitchError,
    OutputFolderError,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from ..hub import inner_experts, push_folder
from .experts import ExpertSource, check_one_base, copy_expert, find_expert
from .folder import check_family_folder, expert_folder, install, staging_folder
from .reading import base_of_family, read_family
from .remote_code import AUTO_MAP, write_stub
from .table import with_experts, without_experts

__all__ = ["Change", "add_experts", "create_family", "create_family_on_hub", "remove_experts"]

_CARD, _CONFIG = "README.md", "config.json"
#: How often an edit is made again when the family on the Hub was changed meanwhile.
_ATTEMPTS = 3

#: A changed configuration, and by path in the family the deltas that are to be copied into it.
_Changed = tuple[MESwitchFamilyConfig, dict[str, ExpertSource]]
_Edit = Callable[[RepoLocation, MESwitchFamilyConfig], _Changed]


@dataclass(frozen=True)
class Change:
    """What a family is after a change.

    Attributes:
        config: its configuration.
        where: its folder, or the URL of the commit or pull request.
    """

    config: MESwitchFamilyConfig
    where: str


def create_family(base: RepoLocation, experts: Mapping[str, RepoLocation], folder: Path) -> Change:
    """Write a new family repo into a folder.

    A base and deltas on the Hub are named by id and commit, deltas from folders are copied into ``experts/``. The
    base's tokenizer, chat template and generation config come along.

    Args:
        base: the base.
        experts: name to delta repo.
        folder: a folder without a model or family.

    Raises:
        BaseMismatchError: a delta of another base.
        DeltaFormatError: a malformed delta.
        ExpertNameError: a name that is reserved or no name, or part of a module's of the base.
        MESwitchError: base or delta cannot be found.
        OutputFolderError: the folder holds a model or a family.
    """
    check_family_folder(folder)
    if (folder / _CONFIG).exists():
        raise OutputFolderError(f"{folder} holds a family already. Add experts to it, or give another folder.")
    base, _ = read_config(base)
    sources = {name: find_expert(location) for name, location in experts.items()}
    check_one_base(sources, base)
    family = MESwitchFamilyConfig(
        portable_name(base.repo),
        None if base.is_local else base.revision,
        base_subfolder=base.subfolder,
        architectures=["MESwitchModelForCausalLM"],
    )
    config, copied = _with_sources(family, sources, base)
    assets = find_assets(base)
    with staging_folder(folder) as staging:
        for path in assets:
            inner = f"{path.parent.name}/{path.name}"
            target = staging / (inner if is_template(inner) else path.name)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        _stage(staging, config, copied, base, read_card(folder / _CARD))
        install(staging, copied)
    return Change(config, str(folder))


def create_family_on_hub(
    base: RepoLocation,
    experts: Mapping[str, RepoLocation],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Change:
    """As :func:`create_family`, in a repo of the Hub, which is made if need be.

    Raises:
        MESwitchError: as :func:`create_family`.
        UnsupportedOperationError: the repo holds a model or a family already, or the base is a folder.
        huggingface_hub.errors.HTTPError: the Hub refused or could not be reached.
    """
    if HfApi().file_exists(repo_id, _CONFIG, revision=revision):
        raise UnsupportedOperationError(
            f"{repo_id} holds a config.json already. Add experts to it if it is a family, or give another id."
        )
    if base.is_local:
        raise UnsupportedOperationError(
            f"The base {base.repo!r} is a folder, which nobody else can load. Push the base, and name it by its id."
        )
    with tempfile.TemporaryDirectory() as folder:
        made = create_family(base, experts, Path(folder))
        message = f"Create a family of {', '.join(experts) or 'no expert yet'}"
        info = push_folder(
            folder, repo_id, private=private, revision=revision, create_pr=create_pr, commit_message=message
        )
    return Change(made.config, info.pr_url or info.commit_url)


def add_experts(family: RepoLocation, experts: Mapping[str, RepoLocation], *, create_pr: bool = False) -> Change:
    """Add experts to a family, in a folder or on the Hub: one commit, with the new deltas and nothing else uploaded.

    Args:
        family: the family repo; on the Hub ``revision`` is the branch.
        experts: name to delta repo.
        create_pr: on the Hub, open a pull request.

    Raises:
        MESwitchError: as :func:`create_family`; or there is no such family.
        huggingface_hub.errors.HTTPError: the Hub refused or could not be reached.
    """
    sources = {name: find_expert(location) for name, location in experts.items()}

    def change(where: RepoLocation, config: MESwitchFamilyConfig) -> _Changed:
        base = base_of_family(where, config)
        changed, copied = _with_sources(config, sources, base)
        check_one_base({**_one_of(where, config), **sources}, base)
        return changed, copied

    return _edit(family, change, f"Add {', '.join(experts)}", create_pr)


def remove_experts(family: RepoLocation, names: Collection[str], *, create_pr: bool = False) -> Change:
    """Remove experts from a family, and their deltas if they are inside it.

    Args:
        family: the family repo; on the Hub ``revision`` is the branch.
        names: the experts.
        create_pr: on the Hub, open a pull request.

    Raises:
        ExpertNotFoundError: the family has no such expert, or its generation config names it as the default.
        MESwitchError: there is no such family.
        huggingface_hub.errors.HTTPError: the Hub refused or could not be reached.
    """

    def change(where: RepoLocation, config: MESwitchFamilyConfig) -> _Changed:
        changed = without_experts(config, names)
        _check_generation_config(where, names)
        return changed, {}

    return _edit(family, change, f"Remove {', '.join(names)}", create_pr)


def _edit(family: RepoLocation, change: _Edit, message: str, create_pr: bool) -> Change:
    if family.is_local:
        return _edit_folder(family, change)
    for attempt in range(_ATTEMPTS):
        # What is named by a branch may have moved since it was cached; the Hub is asked.
        at, config = read_family(family)
        changed, copied = change(at, config)
        with tempfile.TemporaryDirectory() as folder:
            staging = Path(folder)
            _stage(staging, changed, copied, base_of_family(at, config), None)
            for path in inner_experts(changed.to_dict()):  # those that are there already
                (staging / path).mkdir(parents=True, exist_ok=True)
            try:
                info = push_folder(
                    staging,
                    family.repo,
                    revision=family.revision,
                    commit_message=message,
                    create_pr=create_pr,
                    parent_commit=at.revision,
                )
            except HfHubHTTPError as error:
                changed_meanwhile = getattr(error.response, "status_code", None) in (409, 412)
                if not changed_meanwhile or attempt == _ATTEMPTS - 1:
                    raise
                continue
        return Change(changed, info.pr_url or info.commit_url)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _edit_folder(family: RepoLocation, change: _Edit) -> Change:
    folder = Path(family.repo)
    _, config = read_family(family)
    changed, copied = change(family, config)
    with staging_folder(folder) as staging:
        _stage(staging, changed, copied, base_of_family(family, config), read_card(folder / _CARD))
        removed = inner_experts(config.to_dict()) - inner_experts(changed.to_dict())
        install(staging, copied, removed)
    return Change(changed, str(folder))


def _with_sources(
    config: MESwitchFamilyConfig, sources: Mapping[str, ExpertSource], base: RepoLocation | None
) -> _Changed:
    references: dict[str, dict[str, Any]] = {}
    copied: dict[str, ExpertSource] = {}
    taken = inner_experts(config.to_dict())
    for name, source in sources.items():
        if source.location.is_local:
            path = expert_folder(name, [*taken, *copied])
            references[name], copied[path] = {"repo": f"./{path}", "revision": None}, source
        else:
            references[name] = {"repo": source.location.repo, "revision": source.location.revision}
    return with_experts(config, references, _module_names(base, sources)), copied


def _module_names(base: RepoLocation | None, sources: Mapping[str, ExpertSource]) -> list[str]:
    """Dotted names of the base's modules; of those that deltas change, where its configuration is out of reach."""
    if base is not None:
        try:
            return [name for name, _ in meta_model(read_config(base)[1]).named_modules()]
        except MESwitchError:
            pass  # the base is looked for again, and what is wrong with it said, when the family is loaded
    return sorted({name for source in sources.values() for name in source.config.modules or ()})


def _stage(
    staging: Path,
    config: MESwitchFamilyConfig,
    copied: Mapping[str, ExpertSource],
    base: RepoLocation | None,
    existing_card: str | None,
) -> None:
    if copied:
        if base is None:
            raise UnsupportedModelError("The family names no base, so nothing can be added to it. Create it anew.")
        _, base_config = read_config(base)
        for path, source in copied.items():
            copy_expert(source, staging / path, config, base_config)
    config.auto_map = AUTO_MAP
    config.save_pretrained(staging)
    write_stub(staging)
    fresh = family_card(config)
    card = merge_card(existing_card, fresh) if existing_card else fresh
    (staging / _CARD).write_text(card, encoding="utf-8")


def _one_of(family: RepoLocation, config: MESwitchFamilyConfig) -> dict[str, ExpertSource]:
    """An expert that the family has; all have the same base."""
    for name, reference in (config.experts or {}).items():
        where = reference_in_family(family.repo, reference, {"revision": family.revision})
        repo, revision, subfolder = where["repo"], where["revision"], where.get("subfolder")
        location = replace(family, repo=repo, revision=revision, subfolder=subfolder, error=DeltaFormatError)
        return {name: find_expert(location)}
    return {}


def _check_generation_config(family: RepoLocation, removed: Collection[str]) -> None:
    """Refuse to remove an expert that generation asks for by default: every call would fail."""
    path = family.find(GENERATION_CONFIG)
    named = json.loads(path.read_text(encoding="utf-8")).get("expert") if path is not None else None
    for name in [named] if isinstance(named, str) else named or []:
        if name in removed:
            raise ExpertNotFoundError(
                f"{GENERATION_CONFIG} of the family names {name!r} as the expert that answers by default, so it "
                "cannot be removed. Load the family, set model.generation_config.expert to another, and save it."
            )
