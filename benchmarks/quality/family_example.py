"""What the benchmark takes over from ``examples/smollm2_family``: scorers, batches and the base."""

from __future__ import annotations

import sys
from pathlib import Path

# The example's scripts are run from their folder and import each other by their bare names.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "smollm2_family"))

from accuracy import confidence_interval
from orders import score_order
from prepare_base import installed_gguf, prepare_base
from train import TrainingSettings, batches, collate
from word_problems import generate_word_problems, score_word_problem

__all__ = [
    "TrainingSettings",
    "batches",
    "collate",
    "confidence_interval",
    "generate_word_problems",
    "installed_gguf",
    "prepare_base",
    "score_order",
    "score_word_problem",
]
