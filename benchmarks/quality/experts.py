"""Experts on disk: as weights in the work folder, and as int8 deltas in pieces small enough to carry."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["ExpertFolder", "load_pieces", "save_pieces", "weights_digest", "write_checkpoint"]

#: A little under 16 MB.
_PIECE_BYTES = 15_500_000


class ExpertFolder:
    """Where one expert's weights and the account of its training are.

    Args:
        folder: of this expert; made when something is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._weights = folder / "model.safetensors"
        self._training = folder / "training.json"

    def training(self) -> dict[str, Any] | None:
        """How the expert was trained; `None` if there is no expert."""
        return json.loads(self._training.read_text(encoding="utf-8")) if self._training.exists() else None

    def save(self, weights: Mapping[str, Tensor], training: Mapping[str, Any]) -> None:
        """Write weights and then the account, which says that the weights are whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous().cpu() for key, value in weights.items()}, self._weights)
        # Moved into place, since another process may be reading.
        partial = self._training.with_suffix(".partial")
        partial.write_text(json.dumps(training), encoding="utf-8")
        partial.replace(self._training)

    def load(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Parameter's name to its value."""
        return load_file(self._weights, device=str(device))


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values of a state, by which an expert is told from one that was trained like it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_checkpoint(base: Path, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """An expert as a checkpoint folder of its own, with the base's configuration and tokenizer.

    Args:
        base: folder of the base's checkpoint.
        weights: the expert's parameters by name.
        folder: where to write; made.

    Returns:
        ``folder``.
    """
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copy(path, folder / path.name)
    tensors = {key: value.contiguous().cpu() for key, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_pieces(
    base: Mapping[str, Tensor], expert: Mapping[str, Tensor], folder: Path, piece_bytes: int = _PIECE_BYTES
) -> list[Path]:
    """Write an expert as its delta in int8 with a step a row, in files of at most ``piece_bytes`` and a header.

    Vectors (norms) are kept as they are; a matrix may be divided between files.

    Args:
        base: parameter's name to its value.
        expert: the same of the expert.
        folder: where to write ``piece-000.safetensors``, …
        piece_bytes: data of a file, at most (a single row may be larger).

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces: list[dict[str, Tensor]] = [{}]
    room = piece_bytes

    def put(size: int, tensors: dict[str, Tensor]) -> None:
        nonlocal room
        if size > room and pieces[-1]:
            pieces.append({})
            room = piece_bytes
        room -= size
        pieces[-1].update({key: value.contiguous().cpu() for key, value in tensors.items()})

    for name, value in expert.items():
        if value.ndim != 2:
            put(value.numel() * value.element_size(), {f"value:{name}": value})
            continue
        delta = value.float() - base[name].float()
        step = delta.abs().amax(dim=1) / 127
        codes = (delta / step.clamp_min(1e-30)[:, None]).round().to(torch.int8)
        row_bytes, start = value.shape[1] + 4, 0
        while start < len(codes):
            rows = max(1, (room if room >= row_bytes else piece_bytes) // row_bytes)
            part = slice(start, start + rows)
            put(
                row_bytes * len(codes[part]),
                {f"codes:{start}:{name}": codes[part], f"step:{start}:{name}": step[part]},
            )
            start += rows
    paths = [folder / f"piece-{number:03d}.safetensors" for number in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        save_file(piece, path)
    return paths


def load_pieces(base: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The expert that :func:`save_pieces` wrote: base + rounded delta, in the base's dtypes.

    Raises:
        ValueError: a piece is missing.
    """
    parts: dict[str, Tensor] = {}
    for path in sorted(folder.glob("piece-*.safetensors")):
        parts |= load_file(path)
    expert: dict[str, Tensor] = {}
    for name, value in base.items():
        if f"value:{name}" in parts:
            expert[name] = parts[f"value:{name}"]
            continue
        found = (key.split(":", 2) for key in parts)
        starts = sorted(int(part[1]) for part in found if part[0] == "codes" and part[-1] == name)
        codes = [parts[f"codes:{start}:{name}"] for start in starts]
        if sum(map(len, codes)) != len(value):
            raise ValueError(f"the pieces in {folder} hold {sum(map(len, codes))} of {len(value)} rows of {name}")
        steps = [parts[f"step:{start}:{name}"] for start in starts]
        delta = torch.cat(codes).float() * torch.cat(steps)[:, None]
        expert[name] = (value.float() + delta.to(value.device)).to(value.dtype)
    return expert
