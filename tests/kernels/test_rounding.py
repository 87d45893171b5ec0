"""Rounding in turn, by Triton and by torch, against plain Python arithmetic in float64.

On a CPU the kernel runs in Triton's interpreter, which has to be chosen before Triton is imported; so one test starts
this file again in a process of its own.
"""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import pytest
import torch

from meswitch_kernels import round_in_turn, round_in_turn_reference
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
#: (rows, columns): single elements, tails of a program's rows, sizes that are no powers of two, a whole block.
SIZES = [(1, 1), (3, 2), (16, 8), (17, 33), (5, 128)]

Arguments = dict[str, Any]


def random_arguments(out: int, n: int, bits: int, *, column_steps: bool, started: bool) -> Arguments:
    generator = torch.Generator().manual_seed(out * 1000 + n * 10 + bits)
    arguments: Arguments = {
        "values": torch.randn(out, n, generator=generator),
        "step": torch.rand(out, generator=generator) + 0.1,
        "mix": torch.randn(n, n, generator=generator).triu_(1) / max(1, n),
        "bits": bits,
    }
    arguments["step"][-1] = 0
    if column_steps:
        arguments["column_step"] = torch.rand(n, generator=generator) + 0.5
        arguments["column_step"][0] = 0
    if started:
        arguments["start"] = torch.randn(out, n, generator=generator)
    return arguments


def check(arguments: Arguments, levels: torch.Tensor, change: torch.Tensor) -> None:
    """Follow the levels that were chosen: each is the nearest to what stood there, and each change is its own.

    The levels are taken from the result, since a value between two levels may round either way in float32; whether it
    was between them is part of the check.
    """
    values, step, mix = (arguments[name].double().tolist() for name in ("values", "step", "mix"))
    out, n = arguments["values"].shape
    columns = arguments["column_step"].double().tolist() if "column_step" in arguments else [1.0] * n
    start = arguments["start"].double().tolist() if "start" in arguments else None
    half = 2 ** (arguments["bits"] - 1)
    for j in range(out):
        changes: list[float] = []
        for i in range(n):
            value = values[j][i] + sum(changes[k] * mix[k][i] for k in range(i))
            scale = step[j] * columns[i]
            level = float(levels[j, i])
            wanted = value / (scale or 1.0)
            nearest = min(max(math.floor(wanted), -half), half - 1) + 0.5
            assert level == nearest or abs(wanted - round(wanted)) < 1e-4, (j, i)
            changes.append((value if start is None else start[j][i]) - level * scale)
            assert float(change[j, i]) == pytest.approx(changes[-1], abs=1e-4), (j, i)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("started", [False, True], ids=["feedback", "descent"])
@pytest.mark.parametrize("column_steps", [False, True], ids=["row", "row_column"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [pytest.param(1, marks=SLOW), 2, pytest.param(4, marks=SLOW)])
def test_kernel(bits: int, size: tuple[int, int], column_steps: bool, started: bool, device: str) -> None:
    kernel = importlib.import_module("meswitch_kernels.triton_rounding")
    arguments = random_arguments(*size, bits, column_steps=column_steps, started=started)
    on_device = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    margin = 513  # odd, so that the results are not aligned either
    memory = [torch.full((math.prod(size) + 2 * margin,), float("nan"), device=device) for _ in range(2)]
    levels, change = (whole[margin:-margin].view(size) for whole in memory)
    on_device = {"column_step": None, "start": None, **on_device}
    kernel.round_in_turn_triton(levels, change, **on_device)
    check(arguments, levels.cpu(), change.cpu())
    for whole in memory:
        assert whole[:margin].isnan().all()
        assert whole[-margin:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_operator_runs_the_kernel(device: str) -> None:
    arguments = random_arguments(9, 70, 2, column_steps=True, started=True)
    on_device = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    levels, change = round_in_turn(**on_device)
    assert levels.device.type == device
    check(arguments, levels.cpu(), change.cpu())


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernel_in_the_interpreter(slow: bool) -> None:
    pytest.importorskip("triton")
    check_interpreted(__file__, test_kernel, test_operator_runs_the_kernel, slow=slow)


# What follows needs neither Triton nor a GPU.


@pytest.mark.parametrize("started", [False, True], ids=["feedback", "descent"])
@pytest.mark.parametrize("column_steps", [False, True], ids=["row", "row_column"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_reference(bits: int, size: tuple[int, int], column_steps: bool, started: bool) -> None:
    arguments = random_arguments(*size, bits, column_steps=column_steps, started=started)
    check(arguments, *round_in_turn_reference(**arguments))


def test_the_check_sees_a_wrong_level() -> None:
    arguments = random_arguments(3, 5, 2, column_steps=False, started=False)
    levels, change = round_in_turn_reference(**arguments)
    levels[1, 2] = 0.5 - levels[1, 2].sign()
    with pytest.raises(AssertionError):
        check(arguments, levels, change)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_rows_and_no_columns(shape: tuple[int, int]) -> None:
    levels, change = round_in_turn(torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape[1], shape[1]), 1)
    assert levels.shape == change.shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"step": torch.zeros(3)}, r"step is of shape \(3,\), expected \(4,\)"),
        ({"mix": torch.zeros(13, 12)}, r"mix is of shape \(13, 12\), expected \(13, 13\)"),
        ({"column_step": torch.zeros(12)}, r"column_step is of shape \(12,\), expected \(13,\)"),
        ({"start": torch.zeros(4, 2)}, r"start is of shape \(4, 2\), expected \(4, 13\)"),
        ({"values": torch.zeros(4, 257)}, "257 columns, expected at most 256"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(change: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_in_turn(**{**random_arguments(4, 13, 2, column_steps=True, started=True), **change})
