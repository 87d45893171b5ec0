"""What others compute in the place of a delta: a LoRA through PEFT, and BitDelta's kernel from a copy of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from benchmarks.kernels.cases import SECTIONS, Case
from benchmarks.kernels.timing import copies_beyond_cache, device_microseconds
from benchmarks.timing import attempt

__all__ = ["peer_rows"]

_RANK = 64
#: Weights in one integer of BitDelta's.
_PACKED = 32


def peer_rows(section: str, bitdelta: Path | None, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Rows of the peers in a section: PEFT's LoRA for one expert, BitDelta's kernel for experts a row each.

    Args:
        section: of :data:`~benchmarks.kernels.cases.SECTIONS`.
        bitdelta: ``binary_gemm_kernel.py`` of a checkout of BitDelta; without it, there are no rows of it.
        bandwidth: bytes a second.
    """
    cases = {case.what: case for case in SECTIONS[section]()}.values()
    for case in cases:
        if section == "one_expert" and len(case.index) in (1, 16):
            yield _row(section, case, f"PEFT LoRA, rank {_RANK}", lambda case=case: _lora(case), bandwidth)
        if section == "distinct" and bitdelta is not None:
            yield _row(section, case, "BitDelta", lambda case=case: _bitdelta(case, bitdelta), bandwidth)


def _row(
    section: str, case: Case, launch: str, prepare: Callable[[], tuple[list[Callable[[], Any]], int]], bandwidth: float
) -> dict[str, Any]:
    def measured() -> dict[str, Any]:
        calls, read = prepare()
        microseconds = device_microseconds(calls)
        share = read / bandwidth / (microseconds * 1e-6)
        return {"microseconds": microseconds, "bytes": read, "share_of_limit": share}

    row = attempt({"section": section, "what": case.what, "launch": launch}, measured)
    torch.cuda.empty_cache()
    return row


@torch.no_grad()
def _lora(case: Case) -> tuple[list[Callable[[], Any]], int]:
    """Base and adapter; and their bytes with those of activations and results."""
    out, width = case.shape
    read = 2 * (out * width + _RANK * (out + width) + len(case.index) * (width + out))
    x = torch.randn(len(case.index), width, device="cuda", dtype=torch.bfloat16)
    layers = []
    for _ in range(copies_beyond_cache(2 * out * width)):
        base = nn.Linear(width, out, bias=False, device="cuda", dtype=torch.bfloat16)
        config = LoraConfig(r=_RANK, lora_alpha=_RANK, init_lora_weights=False)
        layers.append(LoraLinear(base, "expert", config=config, r=_RANK, lora_alpha=_RANK, init_lora_weights=False))
        layers[-1].to("cuda", torch.bfloat16).eval().requires_grad_(False)
    return [lambda layer=layer: layer(x) for layer in layers], read


def _bitdelta(case: Case, file: Path) -> tuple[list[Callable[[], Any]], int]:
    """One-bit deltas without the base; and their bytes with those of activations and results.

    Raises:
        ArithmeticError: the kernel's result is not that of the dense signs.
    """
    spec = importlib.util.spec_from_file_location("binary_gemm_kernel", file)
    assert spec is not None
    assert spec.loader is not None
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    (out, width), experts = case.shape, case.experts
    x = torch.randn(experts, 1, width, device="cuda", dtype=torch.float16)
    read = experts * (out * width // 8 + 2 * (width + out))
    packed = [
        torch.randint(-(1 << 31), (1 << 31) - 1, (experts, width // _PACKED, out), device="cuda", dtype=torch.int32)
        for _ in range(copies_beyond_cache(read))
    ]
    signs = packed[0][0].unsqueeze(1) >> torch.arange(_PACKED, device="cuda", dtype=torch.int32)[:, None] & 1
    expected = x[0].float() @ (signs.reshape(width, out).float() * 2 - 1)
    error = (kernel.binary_bmm(x, packed[0])[0].float() - expected).norm() / expected.norm()
    if not error < 1e-2:
        raise ArithmeticError(f"the error is {float(error):.3f} of the result")
    return [lambda codes=codes: kernel.binary_bmm(x, codes) for codes in packed], read
