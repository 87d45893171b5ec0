"""``merge_checkpoint``: base + delta as a plain checkpoint, written tensor by tensor."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedConfig

from ..cards import merged_card
from ..compression.assets import generation_config_of
from ..compression.delta_parameters import DeltaParameters
from ..compression.sources import CheckpointParameters, LiveParameters, meta_model, output_head
from ..delta_format.asset_files import GENERATION_CONFIG
from ..delta_format.serialize import file_bytes, tensor_bytes, write_tensors
from ..delta_format.shards import shard_limit, split_tensors
from ..delta_format.tensor_files import TensorFiles
from ..errors import CheckpointError, OutputFolderError
from ..peft_method.injection import expert_info, plan_injection
from ..peft_method.merging import describe_expert
from .inputs import Inputs, open_inputs
from .output import DTYPES, check_output, check_room, copy_assets, license_of_delta, new_folder, origin_of

__all__ = ["MergedCheckpoint", "merge_checkpoint"]

_CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_METADATA = {"format": "pt"}
_TORCH = {name: dtype for dtype, name in DTYPES.items()} | {"F64": torch.float64, "I64": torch.int64}


@dataclass(frozen=True)
class MergedCheckpoint:
    """What :func:`merge_checkpoint` wrote.

    Attributes:
        directory: the folder.
        files: names of the weight files.
        tensors: how many tensors they hold.
        total_bytes: bytes of the weight files.
        dtype: safetensors names of the tensors' dtypes.
        base: the base, and its revision where it is of the Hub.
    """

    directory: Path
    files: tuple[str, ...]
    tensors: int
    total_bytes: int
    dtype: tuple[str, ...]
    base: str


def merge_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    expert: str | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    progress: bool = True,
) -> MergedCheckpoint:
    """Write an expert as a plain checkpoint, ``W + Δ̂``, which loads without this package.

    The tensors are those of ``merge_and_unload()`` of a model that was loaded in the dtype of its checkpoint, bit for
    bit (norms in float32 beside weights in bfloat16 stay so), under the names that the base's checkpoint has. Tensors
    of the base that the causal LM has no place for are left out. One module at a time is in memory.

    Args:
        source: folder or Hub id of a delta repo; of a family repo where ``expert`` is given.
        output_dir: a new or empty folder. It appears when all is written; an interrupted run leaves nothing.
        expert: name of an expert of the family.
        base: folder or Hub id of the base; by default what the family, or else the delta, names.
        base_revision: branch, tag or commit of the base; by default what is named beside it.
        revision: branch, tag or commit of the delta or family repo.
        subfolder: folder inside it.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        dtype: bfloat16, float16 or float32, to which sums are rounded; by default each tensor has the dtype of the
            base's.
        max_shard_size: a weight file's tensors have at most this size together, bytes or such as ``"5GB"``; one alone
            may have more.
        progress: whether to show a progress bar.

    Raises:
        BaseMismatchError: the delta was formed against another base.
        CheckpointError: a missing, truncated or unreadable checkpoint of the base, or one of another dtype; no such
            family, or a family without ``expert``.
        CompressionError: the base is quantised, or incomplete.
        DeltaFormatError: the delta is malformed, or does not fit the base.
        ExpertNotFoundError: the family has no such expert.
        OutputFolderError: the folder holds something, its disk has too little room, or ``max_shard_size`` is no size.
        UnsupportedModelError: the base is of an architecture that transformers itself has not.
        ValueError: another dtype.
        OSError: the disk is not writable.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}, or None.")
    limit = shard_limit(max_shard_size, OutputFolderError)
    output = Path(output_dir)
    check_output(output)
    inputs = open_inputs(
        source,
        expert,
        base=base,
        base_revision=base_revision,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    weights = _Weights(inputs, dtype)
    shards = split_tensors(weights.headers, limit)
    names = _file_names(len(shards))
    sizes = [file_bytes({key: weights.headers[key] for key in keys}, _METADATA) for keys in shards]
    check_room(output, sum(sizes))
    with (
        new_folder(output, _CONFIG) as folder,
        tqdm(total=len(weights.headers), desc="Merging", unit="tensor", disable=not progress) as bar,
    ):

        def get(name: str) -> Tensor:
            bar.update()
            return weights.tensor(name)

        for name, keys in zip(names, shards, strict=True):
            write_tensors(folder / name, {key: weights.headers[key] for key in keys}, get, _METADATA)
        if len(shards) > 1:
            (folder / _INDEX).write_text(_index(dict(zip(names, shards, strict=True)), weights))
        _write_rest(folder, inputs, weights.config, dtype, expert)
    dtypes = tuple(sorted({kind for kind, _ in weights.headers.values()}))
    return MergedCheckpoint(output, names, len(weights.headers), sum(sizes), dtypes, str(inputs.base.location))


class _Weights:
    """The tensors of the merged checkpoint.

    Attributes:
        config: the expert's configuration.
        headers: name to safetensors dtype and shape.
    """

    def __init__(self, inputs: Inputs, dtype: torch.dtype | None) -> None:
        base_model = meta_model(inputs.base.config)
        plan_injection(base_model, inputs.delta.config, "expert", {})
        info = expert_info(inputs.delta.config, base_model)
        self.config: PreTrainedConfig = copy.deepcopy(inputs.base.config)
        describe_expert(self.config, info)
        model = meta_model(self.config)
        self._base = CheckpointParameters(base_model, inputs.base.checkpoint)
        shapes = LiveParameters(model)
        tensors = TensorFiles(inputs.delta.files.weight_paths)
        self._merged = DeltaParameters(model, self._base, shapes, inputs.delta.records, tensors)
        #: Name on disk to module and parameter, or to no module and the tensor of the base that is copied.
        self._source: dict[str, tuple[str | None, str]] = {}
        self.headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._held: tuple[str | None, dict[str, Tensor]] = (None, {})
        head = output_head(model)
        wanted = [
            (f"{module}.{key}" if module else key, module, key)
            for module in shapes.modules
            for key in shapes.shapes(module)
            if not (info.tied and module == head and key == "weight")
        ]
        shared = Counter(self._base.stored_name(full) for full, _, _ in wanted)
        for full, module, key in wanted:
            stored = self._base.stored_name(full)
            kind = inputs.base.checkpoint.dtype(stored) if dtype is None else DTYPES[dtype]
            # Where the base has one tensor for two, as a tied head, and the expert has not, each gets its own name.
            self._announce(full if shared[stored] > 1 else stored, kind, shapes.shapes(module)[key], (module, key))
        for stored in self._base.buffers.values():
            checkpoint = inputs.base.checkpoint
            self._announce(stored, checkpoint.dtype(stored), checkpoint.shape(stored), (None, stored))

    def _announce(self, name: str, kind: str, shape: tuple[int, ...], source: tuple[str | None, str]) -> None:
        if kind not in _TORCH:
            raise CheckpointError(
                f"{name} of {self._base.checkpoint.repo} is of dtype {kind}, expected one of {', '.join(_TORCH)}. "
                "Give a base in one of them."
            )
        self._source[name], self.headers[name] = source, (kind, shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the dtype and shape that are announced, on the CPU."""
        module, key = self._source[name]
        if module is None:
            return self._base.checkpoint.tensor(key)
        # Weight and bias follow each other in the order of names: a module is put together once.
        if self._held[0] != module:
            self._held = (module, self._merged.of(module))
        return self._held[1][key].to(_TORCH[self.headers[name][0]])


def _file_names(count: int) -> tuple[str, ...]:
    if count == 1:
        return (_WEIGHTS,)
    return tuple(f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1))


def _index(shards: dict[str, list[str]], weights: _Weights) -> str:
    total = sum(tensor_bytes(*header) for header in weights.headers.values())
    weight_map = {key: name for name, keys in sorted(shards.items()) for key in keys}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)


def _write_rest(
    folder: Path, inputs: Inputs, config: PreTrainedConfig, dtype: torch.dtype | None, expert: str | None
) -> None:
    """Configuration, generation config, tokenizer and card."""
    if dtype is not None:
        config.dtype = dtype
    if hasattr(config, "auto_map"):
        del config.auto_map  # the code that it names stays in the base's repo, and is not needed
    config.save_pretrained(folder)
    copy_assets(inputs, folder)
    if not (folder / GENERATION_CONFIG).exists():
        generation = generation_config_of(inputs.base.location, config)
        if inputs.delta.config.eos_token_id:
            generation.eos_token_id = config.get_text_config().eos_token_id
        generation.save_pretrained(folder)
    card = merged_card(inputs.delta.config, origin_of(inputs), expert, license=license_of_delta(inputs))
    (folder / "README.md").write_text(card, encoding="utf-8")
