"""Make the example's scripts importable as they import each other, and give them a tiny base."""

import sys
from pathlib import Path

import pytest

from benchmarks.quality.smoke import tiny_base as write_tiny_base

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "smollm2_family"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a random two-layer Llama with a byte tokenizer whose special tokens are SmolLM2's."""
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")
