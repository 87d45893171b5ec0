"""The benchmark of numerics: it sees what rounding costs, and salient channels are not rounded."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kernels.activations import linear_inputs, measure, numerics_errors
from benchmarks.quality.serving import LEVELS, rounded_activations


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def test_inputs_are_those_of_the_layers_asked_for(base: LlamaForCausalLM) -> None:
    ids = torch.arange(9)
    found = linear_inputs(base, [ids, ids.flip(0)], [0, 2], tokens=4)
    assert {name.split(".")[0] for name in found} == {"0", "2"}
    x, energy = found["0.self_attn.q_proj"]
    assert x.shape == (8, 48)
    with torch.no_grad():
        states = [base.model.layers[0].input_layernorm(base.model.embed_tokens(s)) for s in (ids, ids.flip(0))]
    assert torch.equal(x[0], states[0][0])
    assert torch.allclose(energy, torch.cat(states).float().square().sum(dim=0), rtol=1e-4)


def test_rounding_loses_what_its_levels_say() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3000, dtype=torch.bfloat16)
    found = {numerics: error for numerics, error, _ in numerics_errors(x, x.float().square().sum(dim=0), 256)}
    # A result rounded to bfloat16, 8 bits of which are kept, is off by 2^-9 / sqrt(3) or a little more.
    assert 0.001 < found["exact"] < 0.002
    assert found["int16"] < 1.05 * found["exact"]
    # The largest of 1,024 normal numbers is about 3.2 of their deviations: a level is 0.025, off by 0.29 of it.
    assert 0.005 < found["int8"] < 0.01


def test_an_outlier_costs_its_tile_unless_it_is_salient() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2048)
    x[:, 5] = 1000.0
    lost = (rounded_activations(x, LEVELS["int8"]) - x).abs().amax(dim=0)
    assert lost[:1024].max() > 1
    assert lost[1024:].max() < 0.05
    kept = rounded_activations(x, LEVELS["int8"], torch.tensor([5]))
    assert (kept - x).abs().max() < 0.05
    assert torch.equal(kept[:, 5], x[:, 5])


def test_every_projection_has_its_median_and_its_worst_layer(base: LlamaForCausalLM) -> None:
    ids = torch.arange(9)
    found = measure(base, [ids], [0, 1, 2], tokens=3)
    assert len(found) == 7
    errors = []
    for layer in range(3):
        x, energy = linear_inputs(base, [ids], [layer], tokens=3)[f"{layer}.mlp.down_proj"]
        errors.append({numerics: error for numerics, error, _ in numerics_errors(x, energy, 48)}["int8"])
    row = found["mlp.down_proj"]["int8"]
    assert row["median"] == sorted(errors)[1]
    assert row["worst"] == errors[row["worst_layer"]] == max(errors)
