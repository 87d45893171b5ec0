"""The record of a verification, and its file in the delta repo, ``meswitch_evidence.json``.

The file is described in ``docs/delta_format.md``. It is bound to the tensors that were measured by their digest:
evidence of other tensors is never carried along.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..delta_format.header import parse_json
from ..delta_format.spec import EVIDENCE_NAME, KEY_PREFIX, SUPPORTED_BITS
from ..errors import DeltaFormatError

__all__ = [
    "SCHEMA_VERSION",
    "Evidence",
    "TextEvidence",
    "WeightEvidence",
    "dump_evidence",
    "evidence_text_for",
    "parse_evidence",
    "read_evidence",
    "tensors_digest",
    "write_evidence",
]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
#: Numbers that JSON has no notation for, spelled as in Protocol Buffers' JSON.
_SPELLED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@dataclass(frozen=True)
class WeightEvidence:
    """What the checkpoints tell without running them.

    Attributes:
        relative_errors: linear layer, embedding or output head to ``‖Δ − Δ̂‖ / ‖Δ‖`` (Frobenius) of what is quantised.
        weights_by_bits: bits of a code, as a string, to the number of weights of linears coded with so many.
    """

    relative_errors: dict[str, float]
    weights_by_bits: dict[str, int]

    @property
    def mean(self) -> float | None:
        """Mean over the layers; `None` of a delta without quantised ones."""
        errors = self.relative_errors.values()
        return sum(errors) / len(errors) if errors else None

    @property
    def worst(self) -> tuple[str, float] | None:
        """The layer of the largest error, and its error."""
        return max(self.relative_errors.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class TextEvidence:
    """What base, expert and base + delta predict on the same text.

    KL divergences are means a token in nats. Expert and delta are compared over the expert's vocabulary at every
    token; the base can be asked only for tokens that it knows, so ``kl_base``, ``top1_agreement_base`` and all three
    perplexities are over the vocabulary that base and expert share, at the tokens of it.

    Attributes:
        tokens: predicted tokens on which expert and delta are compared.
        shared_tokens: those of them that the base knows.
        vocab_size: rows of the expert's embedding.
        shared_vocab_size: rows that base and expert both have.
        kl: KL(expert ‖ base + delta).
        kl_base: KL(expert ‖ base).
        top1_agreement: share of the tokens at which expert and delta find the same next token most probable, 0 to 1.
        top1_agreement_base: the same of expert and base.
        perplexity_base: of the base.
        perplexity_expert: of the expert.
        perplexity_delta: of base + delta.
        tokens_sha256: SHA-256 of the token ids as little-endian int32; equal for evidence on equal text.
        dtype: of the weights and activations.
        device: the accelerator's name, or ``"cpu"``.
    """

    tokens: int
    shared_tokens: int
    vocab_size: int
    shared_vocab_size: int
    kl: float
    kl_base: float
    top1_agreement: float
    top1_agreement_base: float
    perplexity_base: float
    perplexity_expert: float
    perplexity_delta: float
    tokens_sha256: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Evidence:
    """How well a delta stands for its expert, as measured by :func:`~transformers_meswitch.verify`.

    Attributes:
        tensors_sha256: :func:`tensors_digest` of the delta that was measured.
        base: Hub id of the base; `None` if it was a folder.
        base_revision: commit of the base on the Hub.
        expert: Hub id of the fine-tune; `None` if it was a folder.
        expert_revision: commit of the fine-tune on the Hub.
        date: day of the measurement (UTC), ``YYYY-MM-DD``.
        versions: package to version.
        weights: what the checkpoints tell.
        text: what running them on text tells; `None` if no text was given.
        schema_version: version of this record.
    """

    tensors_sha256: str
    base: str | None
    base_revision: str | None
    expert: str | None
    expert_revision: str | None
    date: str
    versions: dict[str, str]
    weights: WeightEvidence = field(repr=False)
    text: TextEvidence | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def too_far(self) -> bool | None:
        """Whether the delta must not stand for the expert, see :mod:`.judgement`; `None` if no text was run."""
        from .judgement import is_too_far

        return is_too_far(self)

    @property
    def judgement(self) -> str:
        """What the numbers mean, in a sentence or two."""
        from .judgement import judge

        return judge(self)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of a delta's tensors, 64 hexadecimal digits.

    It is fed, for each tensor in the order of names, ``"<name>|<dtype>|<sizes, comma separated>|"`` in UTF-8 (the
    name on disk, the dtype as torch spells it) and then the data as safetensors stores it.

    Args:
        tensors: name to tensor, on any device; names with or without PEFT's prefix ``base_model.model.``.

    >>> tensors_digest({"a": torch.zeros(2)}) == tensors_digest({"base_model.model.a": torch.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    named = {f"{KEY_PREFIX}{name.removeprefix(KEY_PREFIX)}": tensor for name, tensor in tensors.items()}
    for name, tensor in sorted(named.items()):
        data = tensor.detach().cpu().contiguous()
        sizes = ",".join(map(str, data.shape))
        digest.update(f"{name}|{str(data.dtype).removeprefix('torch.')}|{sizes}|".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A value with all that JSON cannot hold spelled out."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in _SPELLED.items() if repr(number) == repr(value))
    return value


def dump_evidence(evidence: Evidence) -> dict[str, Any]:
    """Evidence as plain values for JSON; infinity and NaN are strings."""
    return _plain(dataclasses.asdict(evidence))


def parse_evidence(text: bytes, source: str) -> Evidence:
    """Read evidence from an untrusted file. Fields that this release does not know are left out.

    Args:
        text: the file.
        source: its name, for messages.

    Raises:
        DeltaFormatError: not JSON, a later schema version, a field missing or of the wrong type.
    """
    raw = parse_json(text, source)
    version = raw.get("schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise DeltaFormatError(
            f"{source}: schema_version is {version!r}; this release reads 1 to {SCHEMA_VERSION}. Upgrade "
            "transformers-meswitch, or verify the delta again."
        )
    weights = _record(WeightEvidence, raw.get("weights"), f"{source}: weights")
    if not set(weights.weights_by_bits) <= set(map(str, SUPPORTED_BITS)):
        raise DeltaFormatError(
            f"{source}: weights_by_bits has the bits {list(weights.weights_by_bits)}, expected some of "
            f"{SUPPORTED_BITS}. Verify the delta again."
        )
    text_evidence = None if raw.get("text") is None else _record(TextEvidence, raw["text"], f"{source}: text")
    return _record(Evidence, {**raw, "weights": weights, "text": text_evidence}, source)


#: Annotation of a field (a string, since annotations are not evaluated here) to a test of its value.
_CHECKS: dict[str, Any] = {
    "int": lambda value: type(value) is int and value >= 0,
    "float": lambda value: type(value) in (int, float),
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "dict[str, str]": lambda value: _all_values(value, str),
    "dict[str, int]": lambda value: _all_values(value, int),
    "dict[str, float]": lambda value: _all_values(value, int, float),
    "WeightEvidence": lambda value: isinstance(value, WeightEvidence),
    "TextEvidence | None": lambda value: value is None or isinstance(value, TextEvidence),
}


def _all_values(value: Any, *kinds: type) -> bool:
    return isinstance(value, dict) and all(type(inner) in kinds for inner in value.values())


def _spelled_out(value: Any, kind: str) -> Any:
    if kind == "float":
        return _SPELLED.get(value, value) if isinstance(value, str) else value
    if kind == "dict[str, float]" and isinstance(value, dict):
        return {name: _spelled_out(inner, "float") for name, inner in value.items()}
    return value


def _record(kind: Any, raw: Any, source: str) -> Any:
    """A dataclass of the fields of a JSON object, each checked."""
    if not isinstance(raw, dict):
        raise DeltaFormatError(f"{source} is {raw!r}, expected an object. Verify the delta again.")
    values = {}
    for declared in dataclasses.fields(kind):
        value = _spelled_out(raw.get(declared.name), str(declared.type))
        if not _CHECKS[str(declared.type)](value):
            raise DeltaFormatError(
                f"{source}: {declared.name} is {value!r}, expected {declared.type}. Verify the delta again."
            )
        values[declared.name] = value
    return kind(**values)


def evidence_text_for(path: Path | None, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The contents of an evidence file if it is of these very tensors; `None`, with a word of why, if not.

    Args:
        path: a ``meswitch_evidence.json``; `None` where there is none.
        tensors: the delta's, see :func:`tensors_digest`.
    """
    if path is None:
        return None
    try:
        content = path.read_bytes()
        evidence = parse_evidence(content, str(path))
    except (OSError, DeltaFormatError) as error:
        logger.warning(f"The delta's evidence is left out: {error}")
        return None
    if evidence.tensors_sha256 != tensors_digest(tensors):
        logger.warning(f"{path} is evidence of other tensors and is left out; run meswitch verify again.")
        return None
    return content.decode("utf-8")


def read_evidence(directory: Path) -> Evidence | None:
    """The evidence in a delta's folder; `None` if it has none, or it cannot be read (which is logged).

    It is not compared with the tensors: whoever writes tensors into the folder removes the evidence of earlier ones.
    """
    path = directory / EVIDENCE_NAME
    if not path.is_file():
        return None
    try:
        return parse_evidence(path.read_bytes(), str(path))
    except (OSError, DeltaFormatError) as error:
        logger.warning(f"The delta's evidence is not shown: {error}")
        return None


def write_evidence(directory: Path, evidence: Evidence) -> Path:
    """Write ``meswitch_evidence.json`` into a delta's folder, all of it or nothing.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = directory / EVIDENCE_NAME
    partial = path.with_name(f".{EVIDENCE_NAME}.meswitch-partial")
    try:
        partial.write_text(json.dumps(dump_evidence(evidence), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
