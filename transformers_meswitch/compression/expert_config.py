"""The ``adapter_config.json`` of a delta, filled in from what was compressed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ..cards import hub_id
from ..configuration import MESwitchConfig, MESwitchExpertConfig
from ..delta_format.spec import ModuleRecord
from .assets import token_ids

__all__ = ["expert_config", "portable_name"]


def portable_name(repo: str | os.PathLike[str]) -> str:
    """A Hub id as it is; the path of a local folder made absolute, so that it means the same from elsewhere.

    >>> portable_name("mistralai/Mistral-7B-v0.1")
    'mistralai/Mistral-7B-v0.1'
    """
    name = os.fspath(repo)
    return os.path.abspath(name) if os.path.isdir(name) else name


def expert_config(
    config: MESwitchConfig,
    records: Mapping[str, ModuleRecord],
    *,
    base: str | os.PathLike[str],
    base_revision: str | None,
    base_fingerprint: dict[str, Any] | None,
    expert: str | os.PathLike[str],
    model_config: PreTrainedConfig,
    generation_config: GenerationConfig,
    vocab_size: int,
    tied: bool,
    calibrated: bool,
    calibration: dict[str, Any] | None = None,
) -> MESwitchExpertConfig:
    """Describe a finished delta.

    Args:
        config: what was asked for.
        records: canonical module name to record, of the changed modules.
        base: Hub id or folder of the base, as the user gave it.
        base_revision: commit, branch or tag of the base.
        base_fingerprint: see :mod:`transformers_meswitch.delta_format.fingerprint`; `None` for a base without files.
        expert: Hub id or folder of the fine-tune; only an id is recorded, since a path tells nobody else anything.
        model_config: the expert's configuration.
        generation_config: the expert's; its end-of-sequence and padding tokens are used where it has them, else those
            of ``model_config``. Ids outside the vocabulary are left out.
        vocab_size: rows of the expert's input embedding.
        tied: whether the expert's output head is its input embedding.
        calibrated: whether salient channels were chosen with calibration text.
        calibration: where that can be read again, see :func:`~.calibration_record.calibration_record`.

    Raises:
        CheckpointError: a token that is no id.
    """
    text_config = model_config.get_text_config()

    def tokens(name: str) -> list[int]:
        own = getattr(generation_config, name, None)
        stated = own if own is not None else getattr(text_config, name, None)
        # Configs in the wild pad with -1, or with an id that was never given a row: no token at all.
        return [i for i in token_ids(stated, f"The expert's {name}") if 0 <= i < vocab_size]

    pad = tokens("pad_token_id")
    return MESwitchExpertConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=portable_name(base),
        revision=base_revision,
        inference_mode=True,
        bits=config.bits if config.budget is None else None,
        salient_channels=config.salient_channels,
        modules={name: _entry(record) for name, record in records.items()},
        base_model_type=model_config.model_type,
        base_fingerprint=base_fingerprint,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        eos_token_id=tokens("eos_token_id") or None,
        pad_token_id=pad[0] if pad else None,
        expert_model_name_or_path=hub_id(os.fspath(expert)),
        saliency="reconstruction" if calibrated else "weight",
        calibration=calibration,
    )


def _entry(record: ModuleRecord) -> dict[str, Any]:
    """The record as JSON gives it back: lists for tuples."""
    entry = asdict(record)
    if "shapes" in entry:
        entry["shapes"] = {name: list(shape) for name, shape in entry["shapes"].items()}
    return entry
