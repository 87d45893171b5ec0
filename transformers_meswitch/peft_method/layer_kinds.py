"""Which kind of layer wraps a module of the base."""

from __future__ import annotations

from torch import nn

from .layer import MESwitchLayer
from .linear_layer import LinearLayer
from .rows_layers import HeadLayer, RowsLayer
from .switch import ExpertSwitch
from .values_layer import ValuesLayer

__all__ = ["wrap"]


def wrap(module: nn.Module, kind: str, switch: ExpertSwitch) -> MESwitchLayer:
    """Wrap a base module for a record of ``kind``."""
    if kind == "linear":
        return LinearLayer(module, switch)
    if kind in ("rows", "quantized_rows"):
        return RowsLayer(module, switch) if isinstance(module, nn.Embedding) else HeadLayer(module, switch)
    return ValuesLayer(module, switch)
