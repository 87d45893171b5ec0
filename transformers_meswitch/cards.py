"""Model cards of delta and family repos: rendered from ``model_cards/``, merged into what people wrote by hand."""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import CardData, ModelCard, ModelCardData, RepoCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .card_plot import plot_errors
from .delta_format.folder_lock import PARTIAL_SUFFIX, FolderLock
from .delta_format.spec import ADAPTER_CONFIG_NAME, LinearRecord, QuantizedRowsRecord, record_bytes
from .verification.evidence import read_evidence

if TYPE_CHECKING:
    from .configuration import MESwitchExpertConfig, MESwitchFamilyConfig
    from .export.output import Origin
    from .verification.evidence import Evidence

__all__ = [
    "REPO_PLACEHOLDER",
    "delta_card",
    "family_card",
    "hub_id",
    "lora_card",
    "merge_card",
    "merged_card",
    "read_card",
    "with_license",
    "with_tags",
    "write_delta_card",
]

logger = logging.getLogger(__name__)

#: Stands for the repo's own id in a card that was rendered before the id was known; ``push_folder`` fills it in.
REPO_PLACEHOLDER = "your-name/this-repo"

_BLOCK = re.compile(r"<!-- meswitch:begin -->.*?<!-- meswitch:end -->", re.DOTALL)
#: Tags that a fresh card replaces; every other tag of an existing card belongs to its author.
_GENERATED_TAG = re.compile(r"base_model:.*|[1-4]-bit")


def hub_id(name: str | None) -> str | None:
    """The Hub id that ``name`` is, or ``None`` for a local path, which no card may show.

    >>> hub_id("mistralai/Mistral-7B-v0.1"), hub_id("gpt2"), hub_id("/data/base"), hub_id("./base"), hub_id(None)
    ('mistralai/Mistral-7B-v0.1', 'gpt2', None, None, None)
    """
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def delta_card(
    config: MESwitchExpertConfig,
    *,
    total_bytes: int,
    dense_bytes: int,
    license: str | None = None,
    evidence: Evidence | None = None,
    calibration: str | None = None,
    kl: float | None = None,
) -> str:
    """The ``README.md`` of a delta repo.

    Args:
        config: the repo's ``adapter_config.json``.
        total_bytes: bytes of the delta: its files, or its tensors while there are none.
        dense_bytes: bytes of the expert's parameters in 16 bit.
        license: Hub licence identifier, inherited from the expert or the base where known.
        evidence: what ``meswitch verify`` measured of this delta, for the section on fidelity.
        calibration: which text was calibrated on and how much of it, where known.
        kl: KL divergence from the expert that was measured on a part of that text kept apart, nats a token.

    Raises:
        DeltaFormatError: a malformed ``modules`` table.
    """
    base, expert = hub_id(config.base_model_name_or_path), hub_id(config.expert_model_name_or_path)
    records = config.records().values()
    linears = [record for record in records if isinstance(record, LinearRecord)]
    rows = [record for record in records if isinstance(record, QuantizedRowsRecord)]
    by_bits = sorted(Counter(record.bits for record in linears).items())
    tags = ["me-switch", "peft", "transformers", *([f"base_model:adapter:{base}"] if base else [])]
    tags += ["arxiv:2406.09041", *(f"{bits}-bit" for bits, _ in by_bits)]
    salient = sorted({record.salient_channels for record in linears})
    widths = " or ".join(f"{bits} bit{'' if bits == 1 else 's'}" for bits, _ in by_bits)
    return _render(
        "delta_card.md",
        _metadata(base, license, tags, library="peft"),
        title=f"{expert} as a delta"
        if expert
        else f"A fine-tune of {base} as a delta"
        if base
        else "A fine-tune as a delta",
        base=base,
        base_revision=config.revision if base else None,
        expert=expert,
        bits=widths or "no bits",
        linear_layers=len(linears),
        # Leaves in the expert's own dtype are none of the codes'.
        linear_bytes=sum(record_bytes(record, own_bytes=0) for record in linears),
        row_bytes=sum(record_bytes(record, own_bytes=0) for record in rows),
        coded_rows=sum(record.coded_rows for record in rows),
        row_bits=" or ".join(f"{b} bit{'' if b == 1 else 's'}" for b in sorted({record.bits for record in rows})),
        total_bytes=total_bytes,
        dense_bytes=dense_bytes,
        layers_by_bits=by_bits,
        salient=" or ".join(map(str, salient)) + " a layer" if any(salient) else "none",
        saliency=config.saliency if any(salient) else None,
        calibration=calibration,
        distilled=config.distilled,
        imported_from=config.imported_from,
        kl=kl,
        format_version=config.format_version,
        evidence=evidence,
        plot=plot_errors(evidence.weights.relative_errors) if evidence is not None else "",
    )


def write_delta_card(
    directory: Path,
    config: MESwitchExpertConfig,
    *,
    dense_bytes: int,
    license: str | None = None,
    calibration: str | None = None,
    kl: float | None = None,
) -> None:
    """Write or refresh the ``README.md`` of a delta repo that is otherwise complete.

    It comes last since it states the bytes that were written, and what the evidence in the folder says of them; what
    people wrote into an earlier card stays. One that is no text is left as it is.

    Args:
        directory: the delta repo.
        config: its ``adapter_config.json``.
        dense_bytes: bytes of the expert's parameters in 16 bit.
        license: Hub licence identifier, where known.
        calibration: which text was calibrated on and how much of it, where known.
        kl: KL divergence from the expert that was measured on a part of that text kept apart, nats a token.

    Raises:
        OutputFolderError: somebody else is writing into the folder.
    """
    weights = [*directory.glob("adapter_model*.safetensors"), directory / ADAPTER_CONFIG_NAME]
    total = sum(path.stat().st_size for path in weights)
    evidence = read_evidence(directory)
    fresh = delta_card(
        config,
        total_bytes=total,
        dense_bytes=dense_bytes,
        license=license,
        evidence=evidence,
        calibration=calibration,
        kl=kl,
    )
    path = directory / "README.md"
    existing = read_card(path)
    if existing is None and path.exists():
        return
    lock = FolderLock(directory)
    partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        partial.write_text(fresh if existing is None else merge_card(existing, fresh), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        lock.release()


def read_card(path: Path) -> str | None:
    """A card's text; `None` if there is no such file, or, with a warning, if it is no text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        logger.warning(f"The model card {path} cannot be read ({error}); it is left as it is.")
        return None


def family_card(config: MESwitchFamilyConfig, *, license: str | None = None) -> str:
    """The ``README.md`` of a family repo.

    Args:
        config: the family's ``config.json``.
        license: Hub licence identifier, inherited from the base where known.
    """
    base = hub_id(config.base_model_name_or_path)
    experts = []
    for name, reference in (config.experts or {}).items():
        repo = str(reference["repo"])
        if repo.startswith("./"):
            where = f"in this repo, `{repo[2:]}`"
        else:
            where = f"[{repo}](https://huggingface.co/{repo})" if hub_id(repo) else "not published"
            where += f", `{reference['subfolder']}`" if reference.get("subfolder") else ""
        experts.append(
            {"name": name.replace("|", "\\|"), "where": where, "revision": reference.get("revision") or "—"}
        )
    tags = ["me-switch", "transformers", *([f"base_model:adapter:{base}"] if base else []), "arxiv:2406.09041"]
    return _render(
        "family_card.md",
        _metadata(base, license, tags, library="transformers"),
        title=f"A family of experts on {base}" if base else "A family of experts",
        base=base,
        base_revision=config.base_revision if base else None,
        experts=experts,
        first_expert=json.dumps(next(iter(config.experts or {})), ensure_ascii=False) if experts else "None",
        default_expert=config.default_expert,
        base_quantization=json.dumps(config.base_quantization) if config.base_quantization else None,
        has_router=config.router is not None,
        has_stub=bool(getattr(config, "auto_map", None)),
    )


def merged_card(
    config: MESwitchExpertConfig, origin: Origin, expert: str | None = None, *, license: str | None = None
) -> str:
    """The ``README.md`` of a checkpoint that an expert was merged into.

    Args:
        config: the delta's ``adapter_config.json``.
        origin: what it was made of.
        expert: its name in a family, if it is of one.
        license: Hub licence identifier, where known.
    """
    base = hub_id(origin.base)
    return _render(
        "merged_card.md",
        _metadata(base, license, ["me-switch", "arxiv:2406.09041"], library="transformers", relation="finetune"),
        base=base,
        base_revision=origin.base_revision if base else None,
        origin=origin,
        fine_tune=hub_id(config.expert_model_name_or_path),
        expert=expert,
        bits=config.bits,
    )


def lora_card(
    config: MESwitchExpertConfig,
    origin: Origin,
    expert: str | None = None,
    *,
    rank: int,
    lost: float,
    left_out: Mapping[str, int],
    kl: tuple[float, float, int] | None = None,
    license: str | None = None,
) -> str:
    """The ``README.md`` of a LoRA that was extracted from a delta.

    Args:
        config: the delta's ``adapter_config.json``.
        origin: what it was made of.
        expert: its name in a family, if it is of one.
        rank: of the factors.
        lost: share of the linears' deltas that is not in them.
        left_out: kind to number of modules that a LoRA has no place for: ``rows``, ``values``, ``biases``.
        kl: KL divergence from base + delta with the LoRA and without, nats a token, and the tokens it was measured on.
        license: Hub licence identifier, where known.
    """
    base = hub_id(origin.base)
    return _render(
        "lora_card.md",
        _metadata(base, license, ["lora", "peft", "arxiv:2406.09041"], library="peft"),
        base=base,
        origin=origin,
        fine_tune=hub_id(config.expert_model_name_or_path),
        expert=expert,
        rank=rank,
        lost=lost,
        left_out=left_out,
        kl=kl,
    )


def merge_card(existing: str, fresh: str) -> str:
    """Bring a card up to date without touching what its author wrote.

    The generated block (``<!-- meswitch:begin -->`` to ``<!-- meswitch:end -->``) is replaced, and in the metadata the
    generated keys and tags; a licence, other keys, other tags and all other text stay. A card without exactly one
    such block keeps its whole text, unless it is empty. Where the metadata of either cannot be read, the existing card
    is returned as it is.

    Args:
        existing: the card as it stands.
        fresh: a card just rendered by :func:`delta_card` or :func:`family_card`.

    >>> fresh = "---\\nlibrary_name: peft\\n---\\n<!-- meswitch:begin -->new<!-- meswitch:end -->\\n"
    >>> print(merge_card("---\\nlicense: mit\\n---\\nMine. <!-- meswitch:begin -->old<!-- meswitch:end -->\\n", fresh))
    ---
    license: mit
    library_name: peft
    ---
    Mine. <!-- meswitch:begin -->new<!-- meswitch:end -->
    <BLANKLINE>
    """
    new, old = _parsed(fresh), _parsed(existing)
    if new is None or old is None:
        return existing
    text = old.text
    blocks, replacement = _BLOCK.findall(text), _BLOCK.search(new.text)
    if not text.strip():
        text = new.text
    elif len(blocks) == 1 and replacement is not None:
        text = _BLOCK.sub(lambda _: replacement.group(), text)
    before, merged = old.data.to_dict(), old.data.to_dict()
    for key, value in new.data.to_dict().items():
        if key == "tags":
            kept = [t for t in _as_list(before.get("tags")) if t in value or not _GENERATED_TAG.fullmatch(str(t))]
            value = kept + [tag for tag in value if tag not in kept]
        elif key.startswith("license") and any(k.startswith("license") for k in before):
            continue
        merged[key] = value
    if merged == before and text == old.text:
        return existing
    return _with_metadata(merged, text)


def with_license(card: str, license: dict[str, str]) -> str:
    """The card with the licence keys (``license``, ``license_name``, ``license_link``) added, where it has none.

    A card whose metadata cannot be read is returned as it is.

    >>> print(with_license("---\\nlibrary_name: peft\\n---\\nText.", {"license": "apache-2.0"}))
    ---
    library_name: peft
    license: apache-2.0
    ---
    Text.
    """
    parsed = _parsed(card)
    metadata = {} if parsed is None else parsed.data.to_dict()
    if parsed is None or not license or "license" in metadata:
        return card
    return _with_metadata(metadata | license, parsed.text)


def with_tags(card: str, tags: Iterable[str]) -> str:
    """The card with further tags in its metadata; as it is where that cannot be read."""
    parsed = _parsed(card)
    if parsed is None:
        return card
    metadata = parsed.data.to_dict()
    present = _as_list(metadata.get("tags"))
    new = [tag for tag in dict.fromkeys(tags) if tag not in present]
    return _with_metadata(metadata | {"tags": present + new}, parsed.text) if new else card


def _parsed(card: str) -> RepoCard | None:
    try:
        return RepoCard(card)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        logger.warning(f"The model card's metadata cannot be read ({error}); the card is left as it is.")
        return None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _with_metadata(metadata: dict[str, Any], text: str) -> str:
    newline = "\r\n" if "\r\n" in text else "\n"
    header = CardData(**metadata).to_yaml(line_break=newline, original_order=list(metadata))
    return f"---{newline}{header}{newline}---{newline}{text}"


def _metadata(
    base: str | None, license: str | None, tags: list[str], *, library: str, relation: str = "adapter"
) -> ModelCardData:
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        license=license,
        pipeline_tag="text-generation",
        tags=tags,
    )


def _template(name: str) -> str:
    """A wheel carries the templates inside the package, a checkout at its top level."""
    inside = files("transformers_meswitch") / "model_cards" / name
    if inside.is_file():
        return inside.read_text(encoding="utf-8")
    return (Path(__file__).parent.parent / "model_cards" / name).read_text(encoding="utf-8")


def _render(template: str, metadata: ModelCardData, **values: Any) -> str:
    card = ModelCard.from_template(metadata, template_str=_template(template), repo=REPO_PLACEHOLDER, **values)
    return str(card) + "\n"
