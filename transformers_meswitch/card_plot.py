"""The error of each layer as lines of text, which every viewer of a card shows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

__all__ = ["plot_errors"]

_BARS = "▁▂▃▄▅▆▇█"
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def plot_errors(errors: Mapping[str, float]) -> str:
    """A bar a layer, in a line for each kind of module that the model's layers have.

    Args:
        errors: canonical module name to relative error.

    Returns:
        Lines, the first of which is the scale; no text if there are no errors of layers.

    >>> print(plot_errors({"layers.0.up": 0.1, "layers.1.up": 0.2, "layers.10.up": 0.4, "lm_head": 0.3}))
    a bar a layer, first to last; █ is 0.400
    up  ▂▄█  0.100 to 0.400
    """
    kinds: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        found = _LAYER.search(name)
        if found and math.isfinite(error):
            kinds.setdefault(name[found.end() :], {})[int(found[1])] = error
    if not kinds:
        return ""
    most = max(max(layers.values()) for layers in kinds.values())
    width = max(map(len, kinds))
    lines = [f"a bar a layer, first to last; █ is {most:.3f}"]
    for kind, layers in sorted(kinds.items()):
        bars = "".join(_bar(layers[i], most) for i in sorted(layers))
        lines.append(f"{kind.ljust(width)}  {bars}  {min(layers.values()):.3f} to {max(layers.values()):.3f}")
    return "\n".join(lines)


def _bar(error: float, most: float) -> str:
    return _BARS[max(0, math.ceil(error / most * len(_BARS)) - 1)] if most else _BARS[0]
