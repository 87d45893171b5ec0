"""Writing delta repos so that an interruption never leaves a half that loads.

The configuration is what makes a folder a delta repo. New files are written beside the old ones under temporary names;
only when all are on disk is the old configuration removed, the new files moved into place, and the new configuration
moved last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..configuration import MESwitchExpertConfig
from ..errors import DeltaFormatError, OutputFolderError
from .asset_files import TEMPLATE_FOLDER, is_template, stale_assets
from .folder_lock import PARTIAL_SUFFIX, FolderLock
from .location import is_plain_path
from .serialize import file_bytes, tensor_bytes, write_tensors
from .shards import shard_limit, split_tensors
from .spec import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, EVIDENCE_NAME, FORMAT_VERSION
from .tensor_files import TensorFiles
from .validate import check_config, check_headers, check_values, tensor_headers

__all__ = ["delta_bytes", "write_delta"]

_INDEX_NAME = f"{ADAPTER_WEIGHTS_NAME}.index.json"
#: transformers gives the index of a sharded adapter this name.
_FOREIGN_INDEX_NAME = "model.safetensors.index.json"
#: Of weight files, as transformers and PEFT want it.
_METADATA = {"format": "pt"}
_SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")
#: Tensor name to safetensors dtype and shape.
_Headers = Mapping[str, tuple[str, tuple[int, ...]]]


def _shards(headers: _Headers, limit: int | None) -> dict[str, list[str]]:
    """File name to the names of the tensors it gets."""
    groups = split_tensors(headers, limit)
    if len(groups) == 1:
        return {ADAPTER_WEIGHTS_NAME: groups[0]}
    shards = {f"adapter_model-{i:05}-of-{len(groups):05}.safetensors": keys for i, keys in enumerate(groups, 1)}
    # transformers and PEFT ask the Hub for this file before this package reads the delta.
    return {**shards, ADAPTER_WEIGHTS_NAME: []}


def _json(content: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as cause:
        raise DeltaFormatError(f"{ADAPTER_CONFIG_NAME} cannot be written as JSON: {cause}.") from cause


def _sync(path: Path) -> None:
    # Folders can be neither opened nor synced on Windows, where a rename is durable by itself.
    if os.name == "nt" and path.is_dir():
        return
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stale(directory: Path, kept: set[str]) -> Iterator[Path]:
    """Weight files of an earlier save that the new one does not overwrite, the evidence of them, and assets."""
    for path in sorted(directory.iterdir()):
        ours = path.name in (ADAPTER_WEIGHTS_NAME, _INDEX_NAME, EVIDENCE_NAME) or _SHARD.fullmatch(path.name)
        if path.name not in kept and (ours or (path.name == _FOREIGN_INDEX_NAME and _indexes_adapter(path))):
            yield path
    yield from stale_assets(directory, kept)


def _indexes_adapter(index: Path) -> bool:
    """Whether the index is of a sharded adapter, not of a full checkpoint that shares the folder."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return all(isinstance(name, str) and _SHARD.fullmatch(name) for name in shards)


def _other_files(assets: Sequence[str | os.PathLike[str]], texts: Mapping[str, str]) -> dict[str, Path | bytes]:
    contents: dict[str, Path | bytes] = {}
    for asset in map(Path, assets):
        if not asset.is_file():
            raise DeltaFormatError(f"The asset {asset} is not a file.")
        inner = f"{asset.parent.name}/{asset.name}"
        name = inner if is_template(inner) else asset.name
        if name in contents:
            raise DeltaFormatError(f"Two assets are called {name!r}; the second is {asset}.")
        contents[name] = asset
    contents.update({name: text.encode() for name, text in texts.items()})
    for name in contents:
        reserved = name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, _INDEX_NAME) or _SHARD.fullmatch(name)
        if reserved or ("/" in name and not is_template(name)) or not is_plain_path(name):
            raise DeltaFormatError(f"{name!r} cannot be an extra file of a delta repo; give a plain, unreserved name.")
    return contents


def _check_folder(folder: Path, config: MESwitchExpertConfig) -> None:
    """Refuse a folder that is, or would be taken for, a full model."""
    if (folder / "config.json").exists():
        raise OutputFolderError(
            f"{folder} holds a config.json, so it is a model or a family: a delta in it would replace its tokenizer "
            "and be loaded with it from then on. Give another folder."
        )
    for what, repo in (("base", config.base_model_name_or_path), ("expert", config.expert_model_name_or_path)):
        if repo and folder.is_dir() and os.path.isdir(repo) and folder.samefile(repo):
            raise OutputFolderError(f"{folder} is the {what}'s own folder. Give another.")
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"{folder} is a file, so nothing can be saved in it. Give a folder.")


def _check_targets(folder: Path, names: Iterable[str]) -> None:
    """Find out before the old delta is touched that each new file can take its place."""
    for name in names:
        target = folder / name
        if target.is_dir() and not target.is_symlink():
            raise OutputFolderError(f"{target} is a folder, where a file of the delta has to be. Move it away.")
        if target.parent.exists() and not target.parent.is_dir():
            raise OutputFolderError(f"{target.parent} is a file, where the delta has a folder. Move it away.")


def _table(
    tensors: Mapping[str, torch.Tensor] | TensorFiles,
) -> tuple[_Headers, Callable[[str], torch.Tensor]]:
    if isinstance(tensors, TensorFiles):
        return {key: (header.dtype, header.shape) for key, header in tensors.headers.items()}, tensors.read
    return tensor_headers(tensors), tensors.__getitem__


def delta_bytes(config: MESwitchExpertConfig, tensors: Mapping[str, torch.Tensor] | TensorFiles) -> int:
    """Bytes that :func:`write_delta` writes for the delta itself: the weights in one file, and the configuration.

    Args:
        config: as for :func:`write_delta`.
        tensors: as for :func:`write_delta`; only sizes and dtypes are looked at.

    Raises:
        DeltaFormatError: a tensor of a dtype that the format has no place for.
    """
    return file_bytes(_table(tensors)[0], _METADATA) + len(_json(config.to_dict()))


def write_delta(
    directory: str | os.PathLike[str],
    config: MESwitchExpertConfig,
    tensors: Mapping[str, torch.Tensor] | TensorFiles,
    assets: Sequence[str | os.PathLike[str]] = (),
    *,
    texts: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a delta repo. The same input gives the same bytes.

    An interruption at any moment leaves the complete old delta, the complete new one, or a folder that does not load.
    Weight files and assets of an earlier save that the new one does not bring, and the evidence of old weights, are
    removed: an old chat template would act as the new expert's. Other files in the folder are left alone.

    Args:
        directory: the folder, made if need be.
        config: the configuration, its ``modules`` table included.
        tensors: name on disk to tensor (any device), exactly those that the table announces; or files that hold them,
            which are read one tensor at a time.
        assets: files to copy, under their own names (tokenizer, chat template, generation config), those in a folder
            ``additional_chat_templates`` into one of that name. Texts of the same name win.
        texts: file name to content (the model card).
        max_shard_size: split the weights into files of at most this size (``"5GB"`` or bytes), with an empty one
            beside them under the name that transformers and PEFT look for. By default there is one file.

    Returns:
        The folder.

    Raises:
        DeltaFormatError: the configuration, the tensors or a file name could not be read back; nothing is written.
        OutputFolderError: the folder is a file, holds a full model or a family, or is being written by somebody else;
            nothing is written.
        OSError: the disk is full or not writable.
    """
    folder = Path(directory)
    if config.format_version != FORMAT_VERSION:
        raise DeltaFormatError(
            f"format_version is {config.format_version}; this release writes {FORMAT_VERSION} only."
        )
    records = check_config(config)
    headers, get = _table(tensors)
    check_headers(records, headers)
    check_values(records, get)
    shards = _shards(headers, None if max_shard_size is None else shard_limit(max_shard_size))
    contents = _other_files(assets, texts or {})
    if len(shards) > 1:
        total = sum(tensor_bytes(*header) for header in headers.values())
        weight_map = {key: name for name, keys in shards.items() for key in keys}
        contents[_INDEX_NAME] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    contents[ADAPTER_CONFIG_NAME] = _json(config.to_dict())

    _check_folder(folder, config)
    _check_targets(folder, [*shards, *contents])
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    # Where there are no locks, names that nobody else has at least keep two writers' halves apart.
    partial = {name: folder / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}" for name in [*shards, *contents]}
    try:
        for name, keys in shards.items():
            write_tensors(partial[name], {key: headers[key] for key in keys}, get, metadata=_METADATA)
        for name, content in contents.items():
            if isinstance(content, bytes):
                partial[name].write_bytes(content)
            else:
                shutil.copyfile(content, partial[name])
        for path in partial.values():
            _sync(path)
        (folder / ADAPTER_CONFIG_NAME).unlink(missing_ok=True)
        _sync(folder)
        for path in _stale(folder, set(partial)):
            path.unlink()
        with contextlib.suppress(OSError):  # there is none, or files that are none of ours are in it
            (folder / TEMPLATE_FOLDER).rmdir()
        # The configuration is the last of the names.
        for name, path in partial.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if name == ADAPTER_CONFIG_NAME:
                for parent in {(folder / other).parent for other in partial}:
                    _sync(parent)
            os.replace(path, folder / name)
        _sync(folder)
    finally:
        # A writer that was killed left some; one that is alive has the lock.
        try:
            for path in folder.glob(f".*{PARTIAL_SUFFIX}") if lock.held else partial.values():
                path.unlink(missing_ok=True)
        finally:
            lock.release()
    return folder
