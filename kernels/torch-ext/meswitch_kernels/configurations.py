"""Sizes of blocks of the decode kernels, by GPU family. ``python -m benchmarks.kernels tune`` prints lines for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .op import capability

__all__ = ["Configuration", "Key", "Kind", "configuration", "program_count"]

#: One row's base and delta in one kernel; the deltas of groups of one row; those of groups of several rows. And the
#: latter two of a head, whose kernels hold more.
Kind = Literal["fused", "single", "several", "head_single", "head_several"]


@dataclass(frozen=True)
class Configuration:
    """How a decode kernel divides its work.

    Attributes:
        block_out: output channels of a program, a power of two; 16 or more for groups of several rows.
        block_codes: codes of a tile and of a scale of quantised activations, a power of two, 512 to 2048. Groups of
            several rows have that of groups of one, for which the same activations are prepared.
        block_in: input channels of a tile of the base's weight, a power of two, 16 or more; ``"fused"`` only.
        warps: warps of a program.
        stages: stages of the pipeline of tiles: of the base's weight, or of codes for groups of several rows of exact
            numerics.
        sharers: warps that share output channels, each with a part of their codes: ``warps`` or a divisor of it; for
            groups of several rows of integer numerics. A warp has 16 output channels or more.
        programs: programs a multiprocessor; not of ``"fused"``.
        max_registers: registers of a thread, at most (NVIDIA's compiler), so that enough programs share a
            multiprocessor to keep its memory busy. No limit if `None`.
    """

    block_out: int = 16
    block_codes: int = 1024
    block_in: int = 256
    warps: int = 4
    stages: int = 1
    sharers: int = 4
    programs: int = 16
    max_registers: int | None = None

    def __post_init__(self) -> None:
        # Fewer, and tensor cores would find no turn of their loop in a tile.
        assert self.block_codes >= 512, self.block_codes

    def launch_options(self) -> dict[str, int]:
        """What Triton takes beside a kernel's arguments."""
        return {"num_warps": self.warps} | ({} if self.max_registers is None else {"maxnreg": self.max_registers})


class Key(NamedTuple):
    """What sizes depend on; channels of 0 stand for all shapes that have no line of their own."""

    kind: Kind
    numerics: str
    out_features: int = 0
    in_features: int = 0


_NUMERICS = ("exact", "int8", "int16")

#: By compute capability. A GPU without a table, and a case without a line, run with the default.
_TABLES: dict[tuple[int, int], dict[Key, Configuration]] = {
    # H100, H200. Tuned on an H200 at 2 bits: fused kernels and groups of one row with int8 and int16, groups of
    # several rows with int16 alone. As many programs as the registers allow are the fastest.
    (9, 0): {
        **{Key("fused", numerics): Configuration(block_in=512, stages=3) for numerics in _NUMERICS},
        **{
            Key("fused", numerics, 4096, 14336): Configuration(
                block_out=8, block_codes=2048, block_in=512, warps=4, stages=3
            )
            for numerics in _NUMERICS
        },
        Key("single", "exact"): Configuration(block_out=32, programs=4),
        Key("single", "int8"): Configuration(block_out=32, programs=6),
        Key("single", "int16"): Configuration(warps=2, programs=10, max_registers=96),
        Key("several", "exact"): Configuration(block_out=32, stages=3, programs=3),
        Key("several", "int8"): Configuration(block_out=32, programs=3, max_registers=168),
        Key("several", "int16"): Configuration(block_out=32, programs=4, max_registers=128),
        # Few channels with many codes each: with four warps to share them each would have too many codes.
        Key("several", "int16", 4096, 14336): Configuration(
            block_out=32, warps=8, sharers=8, programs=2, max_registers=128
        ),
        Key("head_single", "exact"): Configuration(block_out=32, programs=4),
        Key("head_single", "int16"): Configuration(block_out=32, programs=4, max_registers=128),
        Key("head_several", "exact"): Configuration(block_out=32, stages=3, programs=3),
        Key("head_several", "int16"): Configuration(block_out=32, programs=2, max_registers=255),
    },
}
_DEFAULT = Configuration()


def configuration(key: Key, device: torch.device) -> Configuration:
    """Sizes for a kernel on a device; ``key`` names the shape.

    >>> configuration(Key("single", "int8", 4096, 4096), torch.device("cpu")) == Configuration()
    True
    """
    table = _TABLES.get(capability(device), {})
    return table.get(key) or table.get(key._replace(out_features=0, in_features=0)) or _DEFAULT


def program_count(work: int, configuration: Configuration, device: torch.device) -> int:
    """Programs to start for so many pieces of work, at most as many as by the sizes share the device at a time."""
    return max(1, min(work, _multiprocessors(device) * configuration.programs))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count)
