"""What a delta repo takes over from the expert's repo beside weights: tokenizer, chat template, generation config."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import GenerationConfig, PreTrainedConfig

from ..delta_format.location import RepoLocation
from ..errors import CheckpointError

__all__ = ["ASSETS", "GENERATION_CONFIG", "find_assets", "generation_config_of", "license_of"]

GENERATION_CONFIG = "generation_config.json"
ASSETS = (
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
)


def find_assets(expert: RepoLocation) -> list[Path]:
    """Tokenizer files, chat template and generation config of the expert's repo, as far as it has them.

    Raises:
        MESwitchError: of the location's type: the repo cannot be reached.
    """
    return [path for path in map(expert.find, ASSETS) if path is not None]


def generation_config_of(expert: RepoLocation, config: PreTrainedConfig) -> GenerationConfig:
    """The expert's ``generation_config.json``; one made of its ``config.json`` where there is none.

    Raises:
        MESwitchError: of the location's type: the repo cannot be reached, or the file is not readable.
    """
    path = expert.find(GENERATION_CONFIG)
    if path is None:
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(path.parent, config_file_name=path.name, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} of the expert cannot be read: {error}") from error


def license_of(*repos: RepoLocation) -> str | None:
    """Hub licence identifier in the card of the first repo that states one."""
    for repo in repos:
        path = repo.find("README.md")
        if path is None:
            continue
        try:
            license = ModelCard.load(path, ignore_metadata_errors=True).data.license
        except ValueError:  # a card whose metadata is not a mapping says nothing
            continue
        if isinstance(license, str):
            return license
    return None
