"""Sizes of blocks of the decode kernels, by GPU family. ``python -m benchmarks.kernels tune`` prints lines for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

__all__ = ["Configuration", "Key", "Kind", "configuration", "program_count"]

#: The delta alone, or the base's matmul with it.
Kind = Literal["delta", "fused"]


@dataclass(frozen=True)
class Configuration:
    """How a decode kernel divides its work.

    Attributes:
        block_out: output channels of a program, a power of two, 16 or more.
        block_codes: codes of a tile and of a scale of quantised activations, a power of two, 512 to 2048.
        block_in: input channels of a tile of the base's weight, a power of two, 16 or more; the fused kernel only.
        warps: warps of a program.
        stages: stages of the pipeline of tiles; of groups of several rows.
        programs: programs a multiprocessor; the delta kernel only.
        max_registers: registers of a thread, at most (NVIDIA's compiler). Groups of several rows take many, and then
            too few programs share a multiprocessor to keep its memory busy for groups of one row. No limit if `None`.
        base_apart: whether torch multiplies by the base, and the delta kernel adds to that; the fused kernel only.
    """

    block_out: int = 16
    block_codes: int = 1024
    block_in: int = 256
    warps: int = 4
    stages: int = 1
    programs: int = 16
    max_registers: int | None = None
    base_apart: bool = False

    def launch_options(self) -> dict[str, int]:
        """What Triton takes beside a kernel's arguments."""
        return {"num_warps": self.warps} | ({} if self.max_registers is None else {"maxnreg": self.max_registers})


class Key(NamedTuple):
    """What sizes depend on; channels of 0 stand for all shapes that have no line of their own."""

    kind: Kind
    numerics: str
    several_rows: bool
    out_features: int = 0
    in_features: int = 0


_NUMERICS = ("exact", "int8", "int16")

#: By compute capability. A GPU without a table, and a case without a line, run with the default.
_TABLES: dict[tuple[int, int], dict[Key, Configuration]] = {
    # H100, H200. Read off the compiled code (registers, spills, instructions a byte), not tuned on the device yet.
    (9, 0): {
        **{Key("delta", numerics, False): Configuration(programs=8) for numerics in _NUMERICS},
        **{
            Key("delta", numerics, True): Configuration(block_out=32, block_codes=512, programs=4, max_registers=128)
            for numerics in _NUMERICS
        },
        **{Key("fused", numerics, False): Configuration() for numerics in _NUMERICS},
        **{
            Key("fused", numerics, True): Configuration(block_out=32, block_codes=512, stages=3, max_registers=168)
            for numerics in _NUMERICS
        },
    },
}
_DEFAULT = Configuration()


def configuration(key: Key, device: torch.device) -> Configuration:
    """Sizes for a kernel on a device; ``key`` names the shape.

    >>> configuration(Key("delta", "int8", False, 4096, 4096), torch.device("cpu")) == Configuration()
    True
    """
    table = _TABLES.get(_capability(device), {})
    return table.get(key) or table.get(key._replace(out_features=0, in_features=0)) or _DEFAULT


def program_count(work: int, configuration: Configuration, device: torch.device) -> int:
    """Programs to start for so many pieces of work: at most as many as share the device at a time."""
    return max(1, min(work, _multiprocessors(device) * configuration.programs))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count)
