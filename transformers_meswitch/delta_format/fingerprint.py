"""The fingerprint of a base: digests of its checkpoint's bytes, before any cast or quantisation.

Algorithm ``sha256-blocks-v1`` (also in ``docs/delta_format.md``). For each tensor of the safetensors files a SHA-256
is fed ``"<dtype>|<sizes, comma separated>|<bytes>|"`` in UTF-8 and then the data: all of it up to 65536 bytes, else 16
blocks of 4096 bytes at offsets ``floor(i * (bytes - 4096) / 15)``. The first 16 hexadecimal digits are the tensor's
digest. The digest of the checkpoint is the SHA-256 of the lines ``"<name> <digest>\\n"``, sorted by name. How tensors
are spread over shards does not matter.

Algorithm ``sha256-all-v1`` is the same with all of the data of every tensor. A fingerprint may have one of it beside
the fast one, under ``"full"``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import BaseMismatchError, CheckpointError, DeltaFormatError
from .header import TensorHeader, read_header

__all__ = ["ALGORITHM", "check_checkpoint", "compare_fingerprints", "fingerprint_checkpoint"]

ALGORITHM, _FULL_ALGORITHM = "sha256-blocks-v1", "sha256-all-v1"
#: Bytes read at a time where all are.
_PIECE = 1 << 24
_WAY_OUT = (
    "Load the base that the delta's adapter_config.json names, at the revision it names (base_model_name_or_path, "
    "revision), or compress the expert again against this base."
)
_WHOLE_BYTES = 65536
_BLOCKS = 16
_BLOCK_BYTES = 4096


def _tensor_digest(file: Any, header: TensorHeader, full: bool) -> str:
    size = header.end - header.start
    digest = hashlib.sha256(f"{header.dtype}|{','.join(map(str, header.shape))}|{size}|".encode())
    if full:
        pieces = [(offset, min(_PIECE, size - offset)) for offset in range(0, size, _PIECE)]
    elif size <= _WHOLE_BYTES:
        pieces = [(0, size)]
    else:
        pieces = [(i * (size - _BLOCK_BYTES) // (_BLOCKS - 1), _BLOCK_BYTES) for i in range(_BLOCKS)]
    for offset, length in pieces:
        file.seek(header.start + offset)
        digest.update(file.read(length))
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _file_digests(path: str, size: int, mtime_ns: int, full: bool) -> dict[str, str]:
    headers = read_header(path, CheckpointError)
    # Unbuffered: the sampled blocks are far apart, and a buffer would read more than it keeps.
    with open(path, "rb", buffering=0) as file:
        return {name: _tensor_digest(file, header, full) for name, header in headers.items()}


def fingerprint_checkpoint(paths: Sequence[str | os.PathLike[str]], *, full: bool = False) -> dict[str, Any]:
    """Fingerprint the safetensors files of one checkpoint.

    A file seen before (same path, size and time) is not read again.

    Args:
        paths: all the checkpoint's safetensors files, in any order.
        full: also of every byte, which reads all of them.

    Returns:
        ``{"algorithm": "sha256-blocks-v1", "digest": 64 hex digits, "tensors": {name: 16 hex digits}}``, and the same
        of ``"sha256-all-v1"`` as ``"full"`` where that is asked for.

    Raises:
        CheckpointError: a missing or truncated file, no files, or a tensor held by two of them.
    """
    found = _fingerprint(paths, full=False)
    return found | {"full": _fingerprint(paths, full=True)} if full else found


def _fingerprint(paths: Sequence[str | os.PathLike[str]], *, full: bool) -> dict[str, Any]:
    if not paths:
        raise CheckpointError("There are no checkpoint files to fingerprint; give all safetensors files of the base.")
    tensors: dict[str, str] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist, so the base cannot be fingerprinted.")
        stat = path.stat()
        for name, digest in _file_digests(str(path.resolve()), stat.st_size, stat.st_mtime_ns, full).items():
            if name in tensors:
                raise CheckpointError(f"Tensor {name!r} is in two of the files {[str(p) for p in paths]}.")
            tensors[name] = digest
    tensors = dict(sorted(tensors.items()))
    lines = "".join(f"{name} {digest}\n" for name, digest in tensors.items())
    algorithm = _FULL_ALGORITHM if full else ALGORITHM
    return {"algorithm": algorithm, "digest": hashlib.sha256(lines.encode()).hexdigest(), "tensors": tensors}


def check_checkpoint(
    expected: Mapping[str, Any] | None, paths: Sequence[str | os.PathLike[str]], base: str, *, full: bool = False
) -> None:
    """Refuse a base's files whose bytes differ from those the delta was formed against; `None` expects nothing.

    Args:
        expected: fingerprint in the delta's ``adapter_config.json``, if it has one.
        paths: all safetensors files of the base at hand.
        base: its id or path, for the message.
        full: compare every byte, not samples.

    Raises:
        BaseMismatchError: see :func:`compare_fingerprints`.
        DeltaFormatError: likewise; or ``full``, and the delta has no fingerprint of every byte.
    """
    if full and not isinstance((expected or {}).get("full"), Mapping):
        raise DeltaFormatError(
            "adapter_config.json: base_fingerprint is of samples of the base's bytes, not of all of them (it has no "
            "'full'). Compare without full, or compress the expert again with full_fingerprint=True (--full)."
        )
    if expected is None:
        return
    found = fingerprint_checkpoint(paths, full=full)
    compare_fingerprints(expected, found, base)
    if full:
        compare_fingerprints(expected["full"], found["full"], base)


def compare_fingerprints(
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    base: str = "the base that is loaded",
    way_out: str = _WAY_OUT,
) -> None:
    """Refuse a base whose bytes differ from those the delta was formed against.

    Args:
        expected: fingerprint in the delta's ``adapter_config.json``.
        found: :func:`fingerprint_checkpoint` of the base at hand.
        base: id or path of the base at hand, for the message.
        way_out: end of the message.

    Raises:
        BaseMismatchError: naming the first tensor (by name) that differs, is missing or is new, and both digests.
        DeltaFormatError: ``expected`` is malformed or of an algorithm this release does not know.
    """
    algorithm, tensors = expected.get("algorithm"), expected.get("tensors")
    if algorithm != found["algorithm"]:
        raise DeltaFormatError(
            f"adapter_config.json: base_fingerprint is of algorithm {algorithm!r}; this release knows "
            f"{found['algorithm']!r}. "
            "Upgrade transformers-meswitch, or compress the expert again."
        )
    if not isinstance(tensors, Mapping) or not isinstance(expected.get("digest"), str):
        raise DeltaFormatError("adapter_config.json: base_fingerprint needs a 'digest' and a 'tensors' object.")
    if expected["digest"] == found["digest"]:
        return
    names = sorted({*tensors, *found["tensors"]})
    differing = [name for name in names if tensors.get(name) != found["tensors"].get(name)]
    if not differing:
        raise DeltaFormatError(
            f"adapter_config.json: base_fingerprint contradicts itself: its tensors give the digest "
            f"{found['digest']}, but it states {expected['digest']!r}."
        )
    first = differing[0]
    raise BaseMismatchError(
        f"This delta was formed against another base than {base}: tensor {first!r} has digest "
        f"{tensors.get(first, 'none (the tensor is not expected)')} in the delta's base and "
        f"{found['tensors'].get(first, 'none (the tensor is missing)')} in {base}; {len(differing)} of {len(names)} "
        f"tensors differ. {way_out}"
    )
