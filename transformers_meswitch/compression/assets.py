"""What a delta repo takes over from the expert's repo beside weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard
from transformers import GenerationConfig, PreTrainedConfig

from ..delta_format.asset_files import ASSETS, GENERATION_CONFIG, TEMPLATE_FOLDER, is_template
from ..delta_format.location import RepoLocation
from ..errors import CheckpointError

__all__ = ["GENERATION_CONFIG", "find_assets", "generation_config_of", "license_of", "token_ids"]

logger = logging.getLogger(__name__)


def find_assets(expert: RepoLocation) -> list[Path]:
    """Tokenizer files, chat templates and generation config of the expert's repo, as far as it has them.

    Raises:
        MESwitchError: of the location's type: the repo cannot be reached.
    """
    listed = (f"{TEMPLATE_FOLDER}/{name}" for name in expert.list_folder(TEMPLATE_FOLDER))
    return [path for path in map(expert.find, [*ASSETS, *filter(is_template, listed)]) if path is not None]


def generation_config_of(expert: RepoLocation, config: PreTrainedConfig) -> GenerationConfig:
    """The expert's ``generation_config.json``; one made of its ``config.json`` where there is none.

    Raises:
        MESwitchError: of the location's type: the repo cannot be reached, or the file is not readable.
    """
    path = expert.find(GENERATION_CONFIG)
    if path is None:
        found = GenerationConfig.from_model_config(config)
    else:
        try:
            found = GenerationConfig.from_pretrained(path.parent, config_file_name=path.name, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} of the expert cannot be read: {error}") from error
    for key in ("eos_token_id", "pad_token_id"):
        token_ids(getattr(found, key), f"{key} of {path or f'{expert}, config.json'}")
    return found


def token_ids(stated: Any, where: str) -> list[int]:
    """The ids that a configuration states for a special token: none, one or several.

    Args:
        stated: an id, a list of them, or `None`.
        where: key and file, for the message.

    Raises:
        CheckpointError: anything else, such as the token's text.

    >>> token_ids(2, "eos_token_id"), token_ids([2, 5], "eos_token_id"), token_ids(None, "eos_token_id")
    ([2], [2, 5], [])
    """
    ids = stated if isinstance(stated, list | tuple) else [] if stated is None else [stated]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{where} is {stated!r}, expected a token id or a list of them. Correct the file.")
    return list(ids)


def license_of(*repos: RepoLocation) -> str | None:
    """Hub licence identifier in the card of the first repo that states one.

    Raises:
        MESwitchError: of a location's type: its repo cannot be reached.
    """
    for repo in repos:
        path = repo.find("README.md")
        if path is None:
            continue
        try:
            license = ModelCard.load(path, ignore_metadata_errors=True).data.license
        except (yaml.YAMLError, ValueError) as error:  # no YAML, no mapping, or no UTF-8
            logger.warning(f"The licence in the card {path} cannot be read: {error}")
            continue
        if isinstance(license, str):
            return license
    return None
