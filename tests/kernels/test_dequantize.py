"""The Triton kernel against a reference that shares nothing with it: Python integers, bit by bit.

On a CPU the kernel runs in Triton's interpreter, which has to be chosen before Triton is imported; so one test starts
this file again in a process of its own.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

import meswitch_kernels
from meswitch_kernels import dequantize_delta, dequantize_delta_reference, has_kernel
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
#: (out_features, in_features, salient_channels): single elements, primes, tails of both blocks, all and none salient.
SIZES = [(1, 1, 0), (1, 1, 1), (3, 7, 2), (8, 256, 0), (5, 255, 1), (9, 257, 3), (17, 521, 16), (2, 40, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Tensors = dict[str, torch.Tensor]


def random_delta(out: int, width: int, bits: int, salient: int, column_steps: bool) -> Tensors:
    generator = torch.Generator().manual_seed(out * 1000 + width * 10 + bits)
    coded = width - salient
    tensors = {
        "codes": torch.randint(0, 256, (out, (coded * bits + 7) // 8), dtype=torch.uint8, generator=generator),
        "step": torch.rand(out, generator=generator) * 1e-2,
    }
    tensors["step"][0] = 0
    if column_steps:
        tensors["column_step"] = torch.rand(coded, generator=generator) + 0.5
    if salient:
        chosen = torch.randperm(width, generator=generator)[:salient].sort().values
        tensors["salient_index"] = chosen.to(torch.int32)
        tensors["salient"] = torch.randn(out, salient, generator=generator).to(torch.bfloat16)
    return tensors


def expected_delta(tensors: Tensors, bits: int, width: int) -> torch.Tensor:
    """float32 ``[out, width]``; each row of codes is one large little-endian integer."""
    salient = tensors["salient_index"].tolist() if "salient_index" in tensors else []
    coded = [channel for channel in range(width) if channel not in salient]
    rows = [int.from_bytes(bytes(row), "little") for row in tensors["codes"].tolist()]
    codes = [[row >> (i * bits) & (2**bits - 1) for i in range(len(coded))] for row in rows]
    values = (2 * torch.tensor(codes).float() + 1 - 2**bits) / 2 * tensors["step"][:, None]
    delta = torch.full((len(rows), width), float("nan"))
    delta[:, coded] = values * tensors["column_step"] if "column_step" in tensors else values
    if salient:
        delta[:, salient] = tensors["salient"].float()
    return delta


def cast(delta: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    if dtype is torch.bfloat16 and device == "cpu":
        # Triton's interpreter drops the low half of a float32 where a GPU rounds it.
        delta = (delta.view(torch.int32) & -65536).view(torch.float32)
    return delta.to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("column_steps", [False, True], ids=["row", "row_column"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [1, pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)])
def test_kernel_writes_every_element_and_nothing_else(
    bits: int, size: tuple[int, int, int], column_steps: bool, device: str
) -> None:
    triton_dequantize = importlib.import_module("meswitch_kernels.triton_dequantize")
    out, width, salient = size
    tensors = random_delta(out, width, bits, salient, column_steps)
    expected = expected_delta(tensors, bits, width)
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    for dtype in DTYPES:
        margin = 513  # odd, so that the result is not aligned either
        memory = torch.full((out * width + 2 * margin,), float("nan"), dtype=dtype, device=device)
        delta = memory[margin:-margin].view(out, width)
        triton_dequantize.dequantize_delta_triton(delta, bits=bits, **on_device)
        assert torch.equal(delta.cpu(), cast(expected, dtype, device)), dtype
        assert memory[:margin].isnan().all()
        assert memory[-margin:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_operator_runs_the_kernel(device: str) -> None:
    tensors = {name: t.to(device) for name, t in random_delta(9, 70, 3, 4, True).items()}
    assert has_kernel(torch.device(device))
    delta = dequantize_delta(bits=3, in_features=70, **tensors)
    assert delta.device.type == device
    assert torch.equal(delta, dequantize_delta_reference(bits=3, in_features=70, **tensors))


@pytest.mark.gpu
def test_rows_past_two_to_the_31_elements() -> None:
    out, width = 2**17 + 8, 2**14
    codes = torch.full((out, width // 8), 0xFF, dtype=torch.uint8, device="cuda")
    step = torch.arange(out, device="cuda").float()
    delta = dequantize_delta(codes, step, 1, width, dtype=torch.bfloat16)
    assert torch.equal(delta[-1], (step[-1:] / 2).to(torch.bfloat16).expand(width))
    assert torch.equal(delta[:, -1], (step / 2).to(torch.bfloat16))


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernel_in_the_interpreter(slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(
        __file__, test_kernel_writes_every_element_and_nothing_else, test_operator_runs_the_kernel, slow=slow
    )


# What follows needs neither Triton nor a GPU.


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_reference(bits: int, size: tuple[int, int, int]) -> None:
    out, width, salient = size
    for column_steps in (False, True):
        tensors = random_delta(out, width, bits, salient, column_steps)
        expected = expected_delta(tensors, bits, width)
        for dtype in DTYPES:
            delta = dequantize_delta_reference(bits=bits, in_features=width, dtype=dtype, **tensors)
            assert torch.equal(delta, expected.to(dtype))


@pytest.mark.parametrize(("salient", "column_steps"), [(0, False), (3, True)])
def test_operator_is_well_formed(salient: int, column_steps: bool) -> None:
    tensors = random_delta(4, 13, 3, salient, column_steps)
    leaves = [tensors.get(name) for name in ("salient_index", "salient", "column_step")]
    torch.library.opcheck(
        meswitch_kernels.op._dequantize_delta, (tensors["codes"], tensors["step"], 3, 13, *leaves, torch.float16)
    )


def test_fake_tensors_get_shape_and_dtype() -> None:
    tensors = {name: t.to("meta") for name, t in random_delta(4, 13, 2, 1, False).items()}
    delta = dequantize_delta(bits=2, in_features=13, dtype=torch.bfloat16, **tensors)
    assert (delta.shape, delta.dtype, delta.device.type) == ((4, 13), torch.bfloat16, "meta")


def test_no_rows_and_no_columns() -> None:
    assert dequantize_delta(torch.zeros(0, 2, dtype=torch.uint8), torch.zeros(0), 2, 5).shape == (0, 5)
    assert dequantize_delta(torch.zeros(3, 0, dtype=torch.uint8), torch.zeros(3), 2, 0).shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"in_features": 90}, r"codes is of shape \(4, 3\), expected \(4, 23\)"),
        ({"step": torch.zeros(3)}, r"step is of shape \(3,\), expected \(4,\)"),
        ({"column_step": torch.zeros(13)}, r"column_step is of shape \(13,\), expected \(12,\)"),
        ({"salient": None}, "belong together"),
        ({"salient": torch.zeros(4, 2)}, r"salient is of shape \(4, 2\), expected \(4, 1\)"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {**random_delta(4, 13, 2, 1, True), "bits": 2, "in_features": 13, **change}
    with pytest.raises(ValueError, match=message):
        dequantize_delta(**arguments)  # type: ignore[arg-type]
