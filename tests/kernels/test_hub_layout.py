"""The folder is a Hub kernel repository: Hugging Face's ``kernels`` parses it and loads what a build makes of it."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import meswitch_kernels

REPOSITORY = Path(__file__).parents[2] / "kernels"
SOURCE = REPOSITORY / "torch-ext" / "meswitch_kernels"


def test_build_file_is_valid() -> None:
    rust = pytest.importorskip("kernels._rust")
    assert rust.Backend.CUDA in rust.Build.open(REPOSITORY).general.backends
    assert (SOURCE / "__init__.py").is_file()


def test_folder_never_becomes_a_package() -> None:
    assert not (REPOSITORY / "__init__.py").exists()


def test_a_build_loads_as_a_local_kernel(tmp_path: Path) -> None:
    """kernel-builder needs nix; for a repository without compiled code it copies the source and adds two files."""
    pytest.importorskip("kernels._rust")  # not the bare name, which our folder would answer to
    kernels = importlib.import_module("kernels")
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(SOURCE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    namespace = "_meswitch_kernels_test"
    (variant / "_ops.py").write_text(
        f"import torch\nops = torch.ops.{namespace}\n\n\n"
        f"def add_op_namespace_prefix(op_name):\n    return f'{namespace}::{{op_name}}'\n"
    )
    metadata = {
        "name": "meswitch-kernels",
        "id": namespace,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    built = kernels.get_local_kernel(tmp_path, backend="cpu")
    assert built is not meswitch_kernels
    delta = built.dequantize_delta(torch.tensor([[0b1100]], dtype=torch.uint8), torch.tensor([2.0]), 2, 2)
    assert delta.tolist() == [[-3.0, 3.0]]
    assert hasattr(torch.ops._meswitch_kernels_test, "dequantize_delta")
