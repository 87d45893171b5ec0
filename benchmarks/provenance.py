"""What a benchmark result needs beside its numbers: where, when, with which versions and by which command."""

from __future__ import annotations

import json
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["device_name", "provenance", "write_result"]

_PACKAGES = ("torch", "transformers", "peft", "huggingface_hub", "safetensors", "triton", "bitsandbytes")


def device_name(device: str) -> str:
    """``"NVIDIA H100 80GB HBM3"``, or the processor for ``"cpu"``."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def provenance(module: str, device: str) -> dict[str, Any]:
    """The head of a result file.

    Args:
        module: the benchmark as run with ``python -m``.
        device: name of the device that was measured.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", "-m", module, *_public(sys.argv[1:])]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device,
        "versions": versions,
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _public(arguments: list[str]) -> list[str]:
    """Where the result was written says nothing about it, and may be a private path; so may be where things are.

    >>> _public(["run", "--base", "/models/smollm2", "--output", "x.json"])
    ['run', '--base', 'BASE']
    """
    at = arguments.index("--output") if "--output" in arguments else len(arguments)
    kept = arguments[:at] + arguments[at + 2 :]
    names = ["PATH", *(argument.lstrip("-").replace("-", "_").upper() for argument in kept)]
    return [name if Path(argument).is_absolute() else argument for name, argument in zip(names, kept, strict=False)]
