"""Deltas that are to be experts of a family: found, checked, and put where the family names them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..cards import hub_id, read_card, write_delta_card
from ..compression.assets import find_assets
from ..configuration import MESwitchExpertConfig, MESwitchFamilyConfig
from ..delta_format.checkpoint import resolve_checkpoint
from ..delta_format.fingerprint import check_checkpoint
from ..delta_format.header import parse_json
from ..delta_format.location import RepoLocation
from ..delta_format.reader import check_delta, open_delta, resolve_delta
from ..delta_format.spec import ADAPTER_CONFIG_NAME, EVIDENCE_NAME, FORMAT_VERSION
from ..delta_format.tensor_files import TensorFiles
from ..delta_format.validate import check_config
from ..delta_format.writer import write_delta
from ..errors import BaseMismatchError, DeltaFormatError, MESwitchError
from ..inspection import full_copy_bytes
from ..verification.evidence import evidence_text_for

__all__ = ["ExpertSource", "check_one_base", "copy_expert", "find_expert", "parse_assignments"]


@dataclass(frozen=True)
class ExpertSource:
    """A delta repo that was found.

    Attributes:
        location: where it is, on the Hub at the commit that was found.
        config: its ``adapter_config.json``, which is sound.
    """

    location: RepoLocation
    config: MESwitchExpertConfig


def find_expert(location: RepoLocation) -> ExpertSource:
    """Find a delta repo. Of one on the Hub only the configuration is fetched; one in a folder is checked whole.

    Raises:
        DeltaFormatError: no such repo, no delta, or a malformed one.
    """
    if location.is_local:
        delta = open_delta(resolve_delta(location.repo, subfolder=location.subfolder))
        check_delta(delta)
        return ExpertSource(location, delta.config)
    path = location.require(ADAPTER_CONFIG_NAME)
    raw = parse_json(path.read_bytes(), str(path))
    check_config(raw)
    known = {field.name for field in dataclasses.fields(MESwitchExpertConfig)}
    config = MESwitchExpertConfig(**{key: value for key, value in raw.items() if key in known})
    return ExpertSource(location.pinned(path), config)


def check_one_base(experts: Mapping[str, ExpertSource], base: RepoLocation | None) -> None:
    """Refuse deltas that were formed against different bases, or another than the family's.

    The deltas are compared with each other; with the base's own files where those are on this machine.

    Args:
        experts: name to delta, of all the experts that are known to belong together or shall.
        base: the family's base, if it names one.

    Raises:
        BaseMismatchError: naming both experts, or the tensor of the base that differs.
    """
    stated = {name: source.config.base_fingerprint for name, source in experts.items()}
    digests = {name: fingerprint.get("digest") for name, fingerprint in stated.items() if fingerprint is not None}
    first = next(iter(digests), None)
    other = next((name for name, digest in digests.items() if first is not None and digest != digests[first]), None)
    if first is not None and other is not None:
        raise BaseMismatchError(
            f"The experts {first!r} and {other!r} were formed against different bases: "
            + " and ".join(
                f"{experts[n].config.base_model_name_or_path} (revision {experts[n].config.revision or 'not known'}, "
                f"fingerprint {str(digests[n])[:12]}…)"
                for n in (first, other)
            )
            + ". A family has one base: compress one of the fine-tunes again against the other's."
        )
    if base is None:
        return
    try:
        paths = resolve_checkpoint(
            base.repo, base.revision, base.token, base.cache_dir, local_files_only=True, subfolder=base.subfolder
        ).paths
    except MESwitchError:
        return  # the base is compared when the family is loaded
    for fingerprint in stated.values():
        check_checkpoint(fingerprint, paths, str(base))


def copy_expert(source: ExpertSource, target: Path, family: MESwitchFamilyConfig, base: PreTrainedConfig) -> None:
    """Write a delta from a folder into a family, with its tokenizer, evidence and card.

    Args:
        source: the delta, in a folder.
        target: the folder it gets.
        family: the family. Where the delta named a folder as its base and the family a Hub id, the copy names that.
        base: configuration of the base.
    """
    delta = open_delta(resolve_delta(source.location.repo, subfolder=source.location.subfolder))
    changes: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "expert_model_name_or_path": hub_id(source.config.expert_model_name_or_path),
    }
    if hub_id(source.config.base_model_name_or_path) is None and hub_id(family.base_model_name_or_path):
        changes |= {"base_model_name_or_path": family.base_model_name_or_path, "revision": family.base_revision}
    config = dataclasses.replace(source.config, **changes)
    card = delta.asset("README.md")
    texts = {
        "README.md": None if card is None else read_card(card),
        EVIDENCE_NAME: evidence_text_for(delta.asset(EVIDENCE_NAME), delta.tensors()),
    }
    write_delta(
        target,
        config,
        TensorFiles(delta.files.weight_paths),
        find_assets(source.location),
        texts={name: text for name, text in texts.items() if text is not None},
    )
    write_delta_card(target, config, dense_bytes=full_copy_bytes(config, base))


def parse_assignments(assignments: Iterable[str]) -> dict[str, RepoLocation]:
    """Expert name to delta repo, of ``NAME=FOLDER``, ``NAME=ID`` or ``NAME=ID@REVISION``.

    Raises:
        DeltaFormatError: another form, or a name that is given twice.

    >>> {name: str(where) for name, where in parse_assignments(["math=me/math-delta@v2"]).items()}
    {'math': 'me/math-delta (revision v2)'}
    """
    found: dict[str, RepoLocation] = {}
    for text in assignments:
        name, equals, repo = text.partition("=")
        if not equals or not name or not repo:
            raise DeltaFormatError(
                f"{text!r} names no expert; expected NAME=DELTA, with a folder, a Hub id or ID@REVISION."
            )
        if name in found:
            raise DeltaFormatError(f"The expert {name!r} is given twice; expected one delta for each name.")
        revision = None
        if not os.path.isdir(repo) and "@" in repo:
            repo, _, revision = repo.partition("@")
        found[name] = RepoLocation(repo, revision, error=DeltaFormatError)
    return found
