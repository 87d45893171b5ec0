"""Named settings: all that a preset is, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["BUDGETS", "DEFAULT_PRESET", "PRESETS"]

DEFAULT_PRESET = "lossless"

#: Arguments of :class:`~transformers_meswitch.MESwitchConfig` that take the place of ``bits``, one at most.
BUDGETS = ("target_bits", "target_size", "max_kl")

#: Name to arguments of :class:`~transformers_meswitch.MESwitchConfig`; what is not named is its default.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The defaults. The name is the aim; what was lost on benchmarks is in docs/quality.md.
    "lossless": {"bits": 2, "salient_channels": 16, "embedding_bits": 3},
    # A fourth less for the linear layers, spent where it buys most.
    "balanced": {"target_bits": 1.5, "salient_channels": 16, "embedding_bits": 3},
    # One bit. A step for each input channel costs less there than salient channels, and buys more.
    "smallest": {"bits": 1, "salient_channels": 4, "column_steps": True, "embedding_bits": 3},
}
