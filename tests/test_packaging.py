"""What is shipped: the wheel, its import without Triton, and the neighbour whose name a folder here shares."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"transformers_meswitch": ROOT, "meswitch_kernels": ROOT / "kernels" / "torch-ext"}


def run_python(code: str, cwd: Path) -> str:
    path = os.pathsep.join(str(folder) for folder in PACKAGES.values())
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_kernels_from_the_root_is_hugging_faces() -> None:
    pytest.importorskip("kernels._rust")  # not the bare name, which our folder would answer to
    found = run_python("import kernels; print(kernels.get_kernel.__module__, kernels.__file__)", ROOT)
    module, file = found.split(maxsplit=1)
    assert module.startswith("kernels.")
    assert not Path(file).is_relative_to(ROOT / "kernels")


def test_import_and_reference_path_without_triton(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None  # as on macOS and Windows: `import triton` raises ModuleNotFoundError
import torch
import meswitch_kernels, transformers_meswitch
from transformers_meswitch.delta_format.spec import LinearRecord
from transformers_meswitch.ops import delta_linear
assert not meswitch_kernels.has_kernel(torch.device("cuda"))
leaves = {"codes": torch.tensor([[0b1100]], dtype=torch.uint8), "step": torch.tensor([2.0])}
record = LinearRecord(out_features=1, in_features=2, bits=2)
print(delta_linear(torch.tensor([[1.0, 2.0]]), record, leaves).item())
"""
    assert run_python(code, tmp_path) == "3.0"


def test_import_needs_no_accelerator_and_no_network(tmp_path: Path) -> None:
    code = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("import opened a connection")
socket.socket.connect = socket.create_connection = refuse
import torch
import meswitch_kernels, transformers_meswitch
print(torch.cuda.is_initialized())
"""
    assert run_python(code, tmp_path) == "False"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is: the wheel from the source distribution."""
    dist = tmp_path_factory.mktemp("dist")
    run = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return next(dist.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_both_packages_and_their_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package, folder in PACKAGES.items():
        sources = [p for p in (folder / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        missing = {p.relative_to(folder).as_posix() for p in sources} - names
        assert not missing
    cards = {f"transformers_meswitch/model_cards/{p.name}" for p in (ROOT / "model_cards").glob("*.md")}
    assert cards
    assert cards <= names


@pytest.mark.slow
def test_wheel_holds_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        size = sum(info.compress_size for info in archive.infolist())
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert size < 20e6
