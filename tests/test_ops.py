"""The two operations: equal bits on torch and on Triton, and the plain matrix product they stand for."""

from __future__ import annotations

import os

import pytest
import torch

import meswitch_kernels
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted
from transformers_meswitch.compression.linear import compress_linear, reconstruct_linear
from transformers_meswitch.ops import delta_linear, dequantize_delta, merged_weight, runs_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored_delta(bits: int, salient: int, column_steps: bool):
    delta = torch.randn(13, 83, generator=torch.Generator().manual_seed(bits)) * 1e-3
    delta[4] = 0
    return compress_linear(delta, bits, salient, column_steps=column_steps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("column_steps", [False, True], ids=["row", "row_column"])
@pytest.mark.parametrize("salient", [0, 5])
@pytest.mark.parametrize("bits", [1, pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)])
def test_triton_gives_the_bits_of_torch(bits: int, salient: int, column_steps: bool, device: str) -> None:
    stored = stored_delta(bits, salient, column_steps)
    expected = reconstruct_linear(stored.record, stored.tensors)
    on_device = {name: tensor.to(device) for name, tensor in stored.tensors.items()}
    assert meswitch_kernels.has_kernel(torch.device(device))
    # Triton's interpreter truncates to bfloat16 where GPUs round.
    for dtype in (torch.float32, torch.float16) if device == "cpu" else DTYPES:
        delta = dequantize_delta(stored.record, on_device, dtype)
        assert torch.equal(delta.cpu(), expected.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW), 4])
def test_merged_by_triton_are_the_bits_of_torch(bits: int, device: str) -> None:
    stored = stored_delta(bits, 5, True)
    on_device = {name: torch.nn.Parameter(tensor.to(device), False) for name, tensor in stored.tensors.items()}
    for dtype in (torch.float32, torch.float16) if device == "cpu" else DTYPES:
        weight = torch.randn(13, 83, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = (weight.float() + reconstruct_linear(stored.record, stored.tensors)).to(dtype)
        assert torch.equal(merged_weight(stored.record, on_device, weight.to(device)).cpu(), expected)
        transposed = weight.to(device).T.contiguous().T
        merged = merged_weight(stored.record, on_device, transposed)
        assert merged.stride() == transposed.stride()
        assert torch.equal(merged.cpu(), expected)


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_triton_in_the_interpreter(slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(
        __file__, test_triton_gives_the_bits_of_torch, test_merged_by_triton_are_the_bits_of_torch, slow=slow
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("salient", [0, 5, 83])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_torch_gives_the_bits_of_the_kernels_reference(bits: int, salient: int, dtype: torch.dtype) -> None:
    for column_steps in (False, True):
        stored = stored_delta(bits, salient, column_steps)
        delta = dequantize_delta(stored.record, stored.tensors, dtype)
        reference = meswitch_kernels.dequantize_delta_reference(
            bits=bits, in_features=83, dtype=dtype, **stored.tensors
        )
        assert torch.equal(delta, reference)
        assert torch.equal(delta, reconstruct_linear(stored.record, stored.tensors).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_linear_is_the_product_with_the_dense_delta(dtype: torch.dtype) -> None:
    stored = stored_delta(2, 5, False)
    x = torch.randn(2, 3, 83, generator=torch.Generator().manual_seed(0)).to(dtype)
    delta = reconstruct_linear(stored.record, stored.tensors).to(dtype)
    product = delta_linear(x, stored.record, stored.tensors)
    assert product.dtype == dtype
    assert torch.equal(product, torch.nn.functional.linear(x, delta))


def test_gradients_reach_the_input() -> None:
    stored = stored_delta(1, 5, True)
    x = torch.randn(4, 83, requires_grad=True)
    delta_linear(x, stored.record, stored.tensors).sum().backward()
    torch.testing.assert_close(x.grad, reconstruct_linear(stored.record, stored.tensors).sum(0).expand(4, 83))


def test_kernels_are_for_devices_that_they_were_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meswitch_kernels, "has_kernel", lambda device: device.type != "mps")
    assert [name for name in ("cpu", "cuda", "xpu", "mps") if runs_kernels(torch.device(name))] == ["cpu", "cuda"]
    # AMD's devices go by the same name.
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not runs_kernels(torch.device("cuda"))
