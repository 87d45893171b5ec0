"""The free share of memory is that of the machine or of the container, whichever is the smaller."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from transformers_meswitch.peft_method import host_memory
from transformers_meswitch.peft_method.host_memory import free_share


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=60, total=100))


def version_2(folder: Path, limit: str, use: int, cache: int = 0) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{use}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cache}\nactive_file 5\n")
    return folder


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    assert free_share(tmp_path / "missing") == 0.6
    assert free_share(version_2(tmp_path, "max", 10)) == 0.6


def test_a_limit_counts_and_files_that_can_be_dropped_do_not(tmp_path: Path) -> None:
    assert free_share(version_2(tmp_path, "1000", 800)) == pytest.approx(0.2)
    assert free_share(version_2(tmp_path, "1000", 800, cache=300)) == pytest.approx(0.5)
    assert free_share(version_2(tmp_path, "1000", 100)) == 0.6
    assert free_share(version_2(tmp_path, "1000", 1200)) == 0.0


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000\n")
    (folder / "memory.usage_in_bytes").write_text("900\n")
    (folder / "memory.stat").write_text("cache 200\ntotal_inactive_file 100\n")
    assert free_share(tmp_path) == pytest.approx(0.2)
    (folder / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert free_share(tmp_path) == 0.6
