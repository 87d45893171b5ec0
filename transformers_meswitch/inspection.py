"""What a delta repo holds, module by module and byte by byte, and how well it stands for the expert."""

from __future__ import annotations

import copy
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .delta_format.spec import (
    ADAPTER_WEIGHTS_NAME,
    AnyRowsRecord,
    LinearRecord,
    ModuleRecord,
    QuantizedRowsRecord,
    RowsRecord,
    ValuesRecord,
    bits_per_weight,
    tensor_key,
)
from .errors import CheckpointError, DeltaFormatError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from .configuration import MESwitchExpertConfig
    from .delta_format.location import RepoLocation
    from .delta_format.reader import Delta

__all__ = [
    "Inspection",
    "ModuleRow",
    "as_json",
    "dense_bytes",
    "exact_deltas",
    "full_copy_bytes",
    "inspect_delta",
    "relative_errors",
]

#: Bytes of a parameter of the full copy that deltas are compared with, in bfloat16.
_DENSE_ITEM = 2

Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class ModuleRow:
    """One module of a delta.

    Attributes:
        module: canonical name.
        kind: ``"linear"``, ``"rows"``, ``"quantized_rows"`` or ``"values"``.
        shape: sizes of its weight; of a linear ``[out, in]``; empty where several parameters are stored.
        bits: bits of a code, of a linear or of quantised rows.
        salient_channels: channels kept in bfloat16, of a linear or of quantised rows.
        stored_rows: rows kept, coded or exact, of an embedding or output head.
        bytes: bytes of its tensors on disk, headers excluded.
        dense_bytes: bytes of the whole module in bfloat16.
        relative_error: ``‖Δ − Δ̂‖ / ‖Δ‖`` (Frobenius) of a linear's weight, or of the coded rows of an embedding or
            output head, where base and expert were given.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    bits: int | None
    salient_channels: int | None
    stored_rows: int | None
    bytes: int
    dense_bytes: int
    relative_error: float | None = None


@dataclass(frozen=True)
class Inspection:
    """A delta repo, counted.

    Attributes:
        repo: folder or Hub id.
        revision: commit on the Hub.
        base: the base's id or path.
        format_version: of the delta format.
        modules: one row a module, layer 2 before layer 10.
        files: name to size on disk of the files that make up the delta (configuration and weights).
        tensor_bytes: sum of the modules' bytes.
        total_bytes: sum of the files' sizes: tensors, safetensors headers and configuration.
        dense_bytes: a full copy of the expert in bfloat16; `None` where the base's configuration is out of reach.
        bits_per_weight: bits that a weight of the linear layers takes on average: codes, steps and salient channels;
            `None` where no linear layer is in the delta.
    """

    repo: str
    revision: str | None
    base: str | None
    format_version: int
    modules: list[ModuleRow] = field(repr=False)
    files: dict[str, int]
    tensor_bytes: int
    total_bytes: int
    dense_bytes: int | None
    bits_per_weight: float | None = None

    @property
    def overhead_bytes(self) -> int:
        """Headers and configuration: what is not tensors."""
        return self.total_bytes - self.tensor_bytes

    @property
    def ratio(self) -> float | None:
        """Bytes of the full copy over bytes of the delta."""
        return None if self.dense_bytes is None else self.dense_bytes / self.total_bytes


def inspect_delta(
    repo: str | Path,
    *,
    revision: str | None = None,
    base: str | None = None,
    expert: str | None = None,
    progress: Progress = iter,
) -> Inspection:
    """Count a delta repo; with ``base`` and ``expert``, measure its quantisation error too.

    Args:
        repo: delta repo, a Hub id or a folder.
        revision: branch, tag or commit of the delta repo.
        base: the base's checkpoint, for the error, and for the ratio where the delta's own base is out of reach.
        expert: the checkpoint of the fine-tune that the delta was made from; needed for the error only.
        progress: wraps the module names while errors are measured, for a progress bar.

    Raises:
        DeltaFormatError: the delta is malformed or absent.
        MESwitchError: base or expert, where given, cannot be read or do not fit, see :func:`relative_errors`.
    """
    from .delta_format.header import read_header
    from .delta_format.reader import open_delta, resolve_delta

    delta = open_delta(resolve_delta(repo, revision=revision))
    config = delta.config
    errors = {}
    if base is not None and expert is not None:
        errors = relative_errors(delta, base, expert, progress=progress)
    base_config = _base_config(delta, base)
    headers = ChainMap(*map(read_header, delta.files.weight_paths))
    tensors = {key: header.end - header.start for key, header in headers.items()}
    modules = [_row(name, delta.records[name], tensors, errors.get(name)) for name in _in_order(delta.records)]
    files = {path.name: path.stat().st_size for path in _delta_files(delta)}
    return Inspection(
        repo=str(repo),
        revision=delta.files.revision,
        base=config.base_model_name_or_path,
        format_version=config.format_version,
        modules=modules,
        files=files,
        tensor_bytes=sum(row.bytes for row in modules),
        total_bytes=sum(files.values()),
        dense_bytes=None if base_config is None else full_copy_bytes(config, base_config),
        bits_per_weight=bits_per_weight(delta.records.values()),
    )


def dense_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters in bfloat16, tied ones once; no headers.

    Args:
        model: on any device, ``meta`` included.
    """
    return _DENSE_ITEM * sum(parameter.numel() for parameter in model.parameters())


def full_copy_bytes(config: MESwitchExpertConfig, base_config: PreTrainedConfig) -> int:
    """Bytes of a full copy of an expert in bfloat16, whatever dtype its own checkpoint has; no headers.

    Args:
        config: the delta's ``adapter_config.json``, which says how wide the expert's vocabulary is and whether its
            head is tied.
        base_config: configuration of the base (or of the expert: nothing else of it differs); left as it is.
    """
    from .compression.sources import meta_model

    model_config = copy.deepcopy(base_config)
    text_config = model_config.get_text_config(decoder=True)
    if config.vocab_size is not None:
        text_config.vocab_size = config.vocab_size
    if config.tie_word_embeddings is not None:
        model_config.tie_word_embeddings = text_config.tie_word_embeddings = config.tie_word_embeddings
    return dense_bytes(meta_model(model_config))


def relative_errors(delta: Delta, base: str, expert: str, *, progress: Progress = iter) -> dict[str, float]:
    """``‖Δ − Δ̂‖ / ‖Δ‖`` of all that a delta quantises, with Δ = expert − base in float32; a layer at a time.

    Of an embedding or output head, Δ is that of the coded rows; exact rows have no error.

    Args:
        delta: the opened delta.
        base: Hub id or folder of the base.
        expert: Hub id or folder of the fine-tune.
        progress: wraps the module names.

    Raises:
        BaseMismatchError: the delta was formed against another base.
        CheckpointError: weights are absent, truncated, or only pickles.
        CompressionError: a checkpoint does not fit its configuration.
        DeltaFormatError: the delta changes a layer that the checkpoints lack, or whose sizes are others.
    """
    names = [name for name in _in_order(delta.records) if isinstance(delta.records[name], _Quantised)]
    exact = exact_deltas(delta, progress(names), base, expert)
    return {name: _relative_error(weight, _reconstruct(delta, name)) for name, weight in exact}


_Quantised = LinearRecord | QuantizedRowsRecord


def exact_deltas(delta: Delta, names: Iterable[str], base: str, expert: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Quantised modules of a delta one by one, each with expert − base; see :func:`relative_errors`.

    Yields:
        The name, and float32 ``[out, in]`` of a linear, or ``[coded rows, width]`` of an embedding or output head.
    """
    from transformers import AutoConfig

    from .compression.rows import coded_index
    from .compression.sources import CheckpointParameters, meta_model
    from .delta_format.checkpoint import resolve_checkpoint
    from .delta_format.fingerprint import check_checkpoint
    from .module_kinds import is_conv1d

    repos = ((base, delta.config.revision_of(base)), (expert, None))
    models = [meta_model(AutoConfig.from_pretrained(repo, revision=revision)) for repo, revision in repos]
    checkpoints = [resolve_checkpoint(repo, revision) for repo, revision in repos]
    sources = [CheckpointParameters(*pair) for pair in zip(models, checkpoints, strict=True)]
    check_checkpoint(delta.config.base_fingerprint, checkpoints[0].paths, base)
    for name in names:
        record = delta.records[name]
        assert isinstance(record, _Quantised)
        for source, repo in zip(sources, (base, expert), strict=True):
            if name not in source.modules:
                raise DeltaFormatError(f"The delta changes {name}, which {repo} lacks; give its own base and expert.")
        of_base, of_expert = (source.of(name)["weight"] for source in sources)
        if is_conv1d(models[0].get_submodule(name)):
            of_base, of_expert = of_base.T, of_expert.T
        shapes = [list(of_base.shape), list(of_expert.shape)]
        if isinstance(record, LinearRecord):
            expected = [record.out_features, record.in_features]
        else:
            expected = [record.coded_rows, record.width]
            rows = coded_index(record, _leaves(delta, name))
            if bool((rows < min(len(of_base), len(of_expert))).all()):
                of_base, of_expert = of_base[rows], of_expert[rows]
        if not list(of_base.shape) == list(of_expert.shape) == expected:
            raise DeltaFormatError(
                f"{name} is {shapes[0]} in {base}, {shapes[1]} in {expert} and {expected} in the delta; give the "
                "delta's own base and expert."
            )
        yield name, of_expert.float() - of_base.float()


def _leaves(delta: Delta, name: str) -> dict[str, torch.Tensor]:
    return {leaf: delta.tensor(tensor_key(name, leaf)) for leaf in delta.records[name].leaves()}


def _reconstruct(delta: Delta, name: str) -> torch.Tensor:
    """The delta that codes stand for, as :func:`exact_deltas` has the exact one."""
    from .compression.linear import reconstruct_linear

    record = delta.records[name]
    assert isinstance(record, _Quantised)
    linear = record if isinstance(record, LinearRecord) else record.as_linear(record.coded_rows)
    return reconstruct_linear(linear, _leaves(delta, name))


def _relative_error(exact: torch.Tensor, approximation: torch.Tensor) -> float:
    norm = float(exact.norm())
    error = float((exact - approximation).norm())
    return error / norm if norm else 0.0 if error == 0 else math.inf


def _base_config(delta: Delta, base: str | None) -> PreTrainedConfig | None:
    """The configuration of the base that was named, else of the delta's own, or `None` where that is out of reach."""
    from transformers import AutoConfig

    from .delta_format.location import RepoLocation

    config = delta.config
    source, revision = (base, None) if base is not None else (config.base_model_name_or_path, config.revision)
    if source is None:
        return None
    inside = delta.files.directory / source
    if base is None and source.startswith(("./", "../")) and inside.is_dir():
        source = str(inside)
    location = RepoLocation(source, revision, error=CheckpointError)
    try:
        if base is None and _is_out_of_reach(location):
            return None
        return AutoConfig.from_pretrained(location.require("config.json").parent, local_files_only=True)
    except (OSError, ValueError):
        if base is not None:
            raise
        return None


def _is_out_of_reach(location: RepoLocation) -> bool:
    """Whether neither this machine nor one request to the Hub knows the repo; a download would retry for long."""
    from huggingface_hub import HfApi

    if location.is_local or replace(location, local_files_only=True).find("config.json") is not None:
        return False
    try:
        return not HfApi().file_exists(location.repo, "config.json", revision=location.revision)
    except Exception:  # of the HTTP client's own types, and which client that is depends on huggingface_hub's release
        return True


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted with layer 2 before layer 10."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]

    return sorted(names, key=key)


def _row(name: str, record: ModuleRecord, tensors: dict[str, int], error: float | None) -> ModuleRow:
    stored = sum(tensors[tensor_key(name, leaf)] for leaf in record.leaves())
    bits = salient = rows = None
    shape: tuple[int, ...] = ()
    elements = 0
    if isinstance(record, LinearRecord):
        shape, bits, salient = (record.out_features, record.in_features), record.bits, record.salient_channels
        elements = math.prod(shape) + record.out_features * record.bias
    elif isinstance(record, AnyRowsRecord):
        shape = (record.num_rows, record.width)
        rows = record.rows if isinstance(record, RowsRecord) else record.coded_rows + record.exact_rows
        if isinstance(record, QuantizedRowsRecord):
            bits, salient = record.bits, record.salient_channels
        elements = math.prod(shape) + record.num_rows * record.bias
    elif isinstance(record, ValuesRecord):
        elements = sum(map(math.prod, record.shapes.values()))
        shape = next(iter(record.shapes.values())) if len(record.shapes) == 1 else ()
    return ModuleRow(name, record.kind, shape, bits, salient, rows, stored, _DENSE_ITEM * elements, error)


def _delta_files(delta: Delta) -> list[Path]:
    """The configuration, the weights, and what else goes with sharded weights."""
    files = delta.files
    names = ("*.safetensors.index.json", ADAPTER_WEIGHTS_NAME) if len(files.weight_paths) > 1 else ()
    beside = [path for name in names for path in files.directory.glob(name)]
    return [files.config_path, *beside, *files.weight_paths]


def as_json(inspection: Inspection) -> dict[str, Any]:
    """An inspection as plain values for JSON, derived totals included."""
    derived = {"overhead_bytes": inspection.overhead_bytes, "ratio": inspection.ratio}
    return asdict(inspection) | derived
