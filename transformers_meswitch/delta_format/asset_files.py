"""Names of the files that a delta repo holds beside weights and configuration: the expert's tokenizer and so on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

__all__ = ["ASSETS", "GENERATION_CONFIG", "TEMPLATE_FOLDER", "is_asset", "is_template", "stale_assets"]

GENERATION_CONFIG = "generation_config.json"
#: Where transformers puts the chat templates of a tokenizer that has several, all but the default one.
TEMPLATE_FOLDER = "additional_chat_templates"
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


def is_template(name: str) -> bool:
    """Whether a name in the repo is that of a further chat template.

    >>> is_template("additional_chat_templates/tool_use.jinja"), is_template("chat_template.jinja")
    (True, False)
    """
    folder, _, file = name.rpartition("/")
    return folder == TEMPLATE_FOLDER and file.endswith(".jinja")


def is_asset(name: str) -> bool:
    """Whether a name in the repo is that of a tokenizer's file, a chat template or the generation config."""
    return name in ASSETS or is_template(name)


def stale_assets(folder: Path, kept: Collection[str]) -> Iterator[Path]:
    """Assets of an earlier save in a folder, which the tokenizer of the new one would take for its own.

    Args:
        folder: the repo.
        kept: names in the repo that the new save writes itself.
    """
    for path in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATE_FOLDER}/*.jinja")]):
        name = path.relative_to(folder).as_posix()
        if is_asset(name) and name not in kept and not path.is_dir():
            yield path
