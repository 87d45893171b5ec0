"""The methods that are compared, by name."""

from __future__ import annotations

import dataclasses
from functools import partial

from transformers_meswitch import MESwitchConfig
from transformers_meswitch.compression.presets import PRESETS

from .base import Compressed, Inputs, Method, merged_weights, rest_bytes
from .distillation import distil
from .folders import from_folders
from .low_rank import mixed_precision_svd, truncated_svd
from .ours import linear_budget, ours
from .stepped import bitdelta, compress_stepped, rounded

__all__ = ["METHODS", "OURS", "Compressed", "Inputs", "Method", "merged_weights", "rest_bytes"]

_SALIENT = 16


def _rounded(inputs: Inputs, *, distilled: bool = False, **how: object) -> Compressed:
    layers = rounded(inputs, **how)  # type: ignore[arg-type]
    return compress_stepped(distil(inputs, layers, steps=inputs.distillation_steps) if distilled else layers)


def _bitdelta(inputs: Inputs, *, distilled: bool) -> Compressed:
    layers = bitdelta(inputs)
    return compress_stepped(distil(inputs, layers, steps=inputs.distillation_steps) if distilled else layers)


def _svd(inputs: Inputs, *, bits: int, channels: int, mixed: bool) -> Compressed:
    return (mixed_precision_svd if mixed else truncated_svd)(inputs, linear_budget(inputs, bits, channels))


def _as_a_user(inputs: Inputs, *, config: MESwitchConfig) -> Compressed:
    if config.target_bits is not None:
        # The tiny model of a smoke run is so narrow that its steps alone take more.
        weights = sum(inputs.base[f"{name}.weight"].numel() for name in inputs.linears())
        least = 8 * sum(linear_budget(inputs, 1, 0).values()) / weights
        config = dataclasses.replace(config, target_bits=max(config.target_bits, 1.01 * least))
    return from_folders(inputs, config)


#: How the package compresses, by the name of the method.
OURS = {
    "ours-1bit": MESwitchConfig(bits=1, salient_channels=0, column_steps=True),
    "ours-1bit-salient": MESwitchConfig(bits=1, salient_channels=_SALIENT, column_steps=True),
    "ours-2bit-plain": MESwitchConfig(bits=2, salient_channels=0),
    "ours-2bit-4": MESwitchConfig(bits=2, salient_channels=4),
    "ours-2bit": MESwitchConfig(bits=2, salient_channels=_SALIENT),
    "ours-2bit-64": MESwitchConfig(bits=2, salient_channels=64),
    "ours-3bit": MESwitchConfig(bits=3, salient_channels=_SALIENT),
}
_ABOUT_OURS = {
    "ours-1bit": "1 bit, no salient channels, steps a row and a column",
    "ours-1bit-salient": "1 bit, 16 salient channels, steps a row and a column",
    "ours-2bit-plain": "2 bits, no salient channels",
    "ours-2bit-4": "2 bits, 4 salient channels",
    "ours-2bit": "2 bits, 16 salient channels",
    "ours-2bit-64": "2 bits, 64 salient channels",
    "ours-3bit": "3 bits, 16 salient channels",
}

METHODS = {
    method.name: method
    for method in (
        Method("expert", "the full-precision expert", None),
        Method("base", "the base in the expert's place", None),
        Method("rtn-2bit", "2 bits, step a row, round to nearest", partial(_rounded, bits=2)),
        Method("rtn-3bit", "3 bits, step a row, round to nearest", partial(_rounded, bits=3)),
        Method(
            "magnitude-2bit",
            "2 bits, step a row, 16 salient channels by magnitude",
            partial(_rounded, bits=2, channels=_SALIENT, saliency="magnitude"),
        ),
        Method(
            "meswitch-2bit",
            "2 bits, step a row, 16 salient channels by reconstruction error",
            partial(_rounded, bits=2, channels=_SALIENT),
        ),
        Method(
            "meswitch-2bit-distilled",
            "ME-Switch as published: the same with steps distilled",
            partial(_rounded, bits=2, channels=_SALIENT, distilled=True),
        ),
        Method("bitdelta", "1 bit, one scalar a matrix", partial(_bitdelta, distilled=False)),
        Method("bitdelta-distilled", "BitDelta as published: scalars distilled", partial(_bitdelta, distilled=True)),
        Method("svd-1bit", "truncated SVD in the bytes of 1 bit", partial(_svd, bits=1, channels=0, mixed=False)),
        Method(
            "svd-2bit",
            "truncated SVD in the bytes of ours-2bit",
            partial(_svd, bits=2, channels=_SALIENT, mixed=False),
        ),
        Method(
            "mixed-svd-1bit",
            "8/3/2-bit singular vectors in the bytes of 1 bit",
            partial(_svd, bits=1, channels=0, mixed=True),
        ),
        Method(
            "mixed-svd-2bit",
            "8/3/2-bit singular vectors in the bytes of ours-2bit",
            partial(_svd, bits=2, channels=_SALIENT, mixed=True),
        ),
        *(
            Method(name, f"this package, {about}", partial(ours, config=OURS[name]))
            for name, about in _ABOUT_OURS.items()
        ),
        *(
            Method(
                f"ours-{bits}bit",
                f"this package, a budget of {bits} bits a weight",
                partial(_as_a_user, config=MESwitchConfig(target_bits=bits)),
            )
            for bits in (1.2, 1.5, 2.1)
        ),
        *(
            Method(
                f"preset-{name}",
                f"meswitch compress --preset {name}",
                partial(_as_a_user, config=MESwitchConfig.from_preset(name)),
            )
            for name in PRESETS
        ),
        *(
            Method(f"{name}-distilled", f"{name}, distilled", partial(from_folders, config=OURS[name], distilled=True))
            for name in ("ours-1bit", "ours-1bit-salient", "ours-2bit")
        ),
        *(
            Method(
                f"{name}-alone",
                f"{name}, fitted to the expert's own inputs",
                partial(ours, config=OURS[name], fit="alone"),
            )
            for name in ("ours-1bit", "ours-2bit")
        ),
        *(
            Method(
                f"{name}-diagonal",
                f"{name}-alone, fitted to each channel's energy alone",
                partial(ours, config=OURS[name], fit="diagonal"),
            )
            for name in ("ours-1bit", "ours-2bit")
        ),
    )
}
