"""What the whole suite shares: where GPU tests run, and how hypothesis behaves on slow machines."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core: threads would wait for each other, those of the programs that tests start too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

pytest_plugins = ["tests.fixtures_models"]

settings.register_profile("meswitch", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("meswitch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What one worker runs as a whole comes first, or the others wait for it in the end.
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
