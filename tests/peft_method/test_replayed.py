"""Layers that are compiled once, and then answer as whichever expert is chosen without being compiled again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.fixtures_models import TinyFamily
from tests.peft_method.test_kernel_path import DEVICE, INTERPRETED, linears, model, needs_kernels, tiny_family
from tests.triton_interpreter import check_interpreted
from transformers_meswitch.errors import UnsupportedOperationError
from transformers_meswitch.peft_method.injection import wrapped_layers
from transformers_meswitch.peft_method.live_choice import LiveChoice
from transformers_meswitch.peft_method.values_layer import ValuesLayer
from transformers_meswitch.peft_method.values_stack import run_with_rows, takes_rows

__all__ = ["model", "tiny_family"]


def norms(model: Any) -> list[ValuesLayer]:
    return [layer for layer in wrapped_layers(model).values() if isinstance(layer, ValuesLayer)]


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("kind", [linears, norms])
def test_one_compilation_serves_all_experts(tiny_family: TinyFamily, model: Any, kind: Any) -> None:
    layer = next(found for found in kind(model) if found.delta_of("math") and found.delta_of("code"))
    width = layer.in_features if kind is linears else layer.base_layer.weight.shape[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_choices(tiny_family, model, layer, compiled, x)


def check_choices(tiny_family: TinyFamily, model: Any, layer: Any, compiled: Any, x: torch.Tensor) -> None:
    """Whatever is chosen, compiled code answers as Python does."""
    answers = {}
    for expert in ("math", "code", None):
        model.set_expert(expert)
        answers[expert] = layer(x)
        assert torch.allclose(compiled(x), answers[expert], atol=1e-5)
    model.set_expert("math")
    model.disable_adapters()
    assert torch.allclose(compiled(x), answers[None], atol=1e-5)
    model.enable_adapters()
    with model._meswitch_switch.rows(["code", None]):
        assert torch.allclose(compiled(x), torch.cat([answers["code"][:1], answers[None][1:]]), atol=1e-5)
    assert torch.allclose(compiled(x), answers["math"], atol=1e-5)
    assert not torch.allclose(answers["math"], answers["code"], atol=1e-2)
    # An expert that takes the place of another, and one that leaves.
    model.delete_adapter("code")
    assert torch.allclose(compiled(x), answers["math"], atol=1e-5)
    model.load_adapter(tiny_family.deltas["code"], adapter_name="again")
    assert torch.allclose(compiled(x), answers["code"], atol=1e-5)


def test_rows_of_a_request_are_spread_as_outside_of_graphs() -> None:
    live = LiveChoice(torch.device("cpu"))
    assert live.index(3).tolist() == [-1, -1, -1]
    live.write([4, -1, 0], [9, 8, 7])
    assert live.index(3).tolist() == [4, -1, 0]
    assert live.index(6).tolist() == [4, 4, -1, -1, 0, 0]
    assert live.index(3, 2).tolist() == [4, 4, -1, -1, 0, 0]
    live.write([2], [5])
    assert live.index(2, 2).tolist() == [2, 2, 2, 2]
    live.begin()
    groups = live.groups(2, 1)
    assert groups.slot.tolist() == [2, 2]
    assert live.groups(2, 1) is groups
    with pytest.raises(UnsupportedOperationError, match="5000 experts were named"):
        live.write([0] * 5000, [1] * 5000)


class Mixing(nn.Module):
    """A product with the parameter, but of rows with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(0, keepdim=True) * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_of_torch_take_a_weight_a_row(norm: Any, dtype: torch.dtype) -> None:
    module = norm(8).to(dtype)
    assert takes_rows(module)
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8).to(dtype)
    rows = {name: torch.randn(3, 8).to(dtype) for name, _ in module.named_parameters()}
    ours = run_with_rows(module, x, rows)
    for row in range(3):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(rows[name][row])
        # torch rounds once more on its way, before it multiplies by the weight.
        tolerance = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 1e-2}
        torch.testing.assert_close(ours[row], module(x[row]), **tolerance)


def test_modules_that_cannot_are_told() -> None:
    assert not takes_rows(Mixing())
    assert not takes_rows(nn.Conv1d(3, 3, 1))
    assert not takes_rows(nn.Sequential(nn.LayerNorm(8)))
    assert not takes_rows(nn.Identity())


@pytest.mark.skipif(INTERPRETED, reason="runs the tests above")
def test_in_the_interpreter() -> None:
    check_interpreted(__file__, test_one_compilation_serves_all_experts)
