"""What the whole suite shares: where GPU tests run, and how hypothesis behaves on slow machines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.fixtures_models"]

settings.register_profile("meswitch", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("meswitch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
