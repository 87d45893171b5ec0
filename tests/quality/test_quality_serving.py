"""The benchmark's served model against the package's own layers on a delta that was written and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.methods import merged_weights
from benchmarks.quality.methods.ours import ours
from benchmarks.quality.serving import LEVELS, prepare_serving, put_weights, rounded_activations
from transformers_meswitch import MESwitchConfig, compress

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture
def served(pair):
    model = copy.deepcopy(pair.inputs.model)
    prepare_serving(model)
    return model


@torch.no_grad()
def test_the_logits_are_those_of_the_packages_layers(pair, served, tmp_path):
    config = MESwitchConfig(bits=2, salient_channels=3, embedding_bits=None)
    compress(pair.base, pair.expert, tmp_path / "delta", config, calibration=None, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "delta", dtype=torch.bfloat16).eval()
    deltas = {}
    even = {name: torch.ones(len(moment)) for name, moment in pair.inputs.moments.items()}
    inputs = copy.copy(pair.inputs)
    inputs.moments = even
    deltas = ours(inputs, config, fit="alone").deltas
    base = {f"{name}.weight": pair.inputs.base[f"{name}.weight"] for name in deltas}
    put_weights(served, {**pair.inputs.expert, **base}, deltas)
    ours_logits, theirs = served(TOKENS).logits, loaded(TOKENS).logits
    torch.testing.assert_close(ours_logits, theirs, rtol=2e-2, atol=2e-2)
    put_weights(served, {**pair.inputs.expert, **base}, {})
    assert (served(TOKENS).logits - theirs).abs().max() > 10 * (ours_logits - theirs).abs().max()


@torch.no_grad()
def test_deltas_that_are_left_out_are_zero_again(pair, served):
    plain = copy.deepcopy(pair.inputs.model)
    for name, parameter in plain.named_parameters():
        parameter.copy_(pair.inputs.expert[name])
    deltas = {name: pair.inputs.delta(name) for name in pair.inputs.linears()}
    put_weights(served, pair.inputs.expert, deltas)
    assert not torch.equal(served(TOKENS).logits, plain(TOKENS).logits)
    put_weights(served, pair.inputs.expert, {})
    assert torch.equal(served(TOKENS).logits, plain(TOKENS).logits)


@torch.no_grad()
def test_merged_prompts_are_those_of_the_merged_weights(pair, served):
    deltas = {name: pair.inputs.delta(name) * 1.01 for name in pair.inputs.linears()}
    base = {f"{name}.weight": pair.inputs.base[f"{name}.weight"] for name in deltas}
    rest = {**pair.inputs.expert, **base}
    merged = copy.deepcopy(pair.inputs.model)
    for name, parameter in merged.named_parameters():
        parameter.copy_(merged_weights(pair.inputs.base, pair.inputs.expert, deltas)[name])
    put_weights(served, rest, deltas, merged_prompts=True)
    assert torch.equal(served(TOKENS).logits, merged(TOKENS).logits)
    one = served(TOKENS[:, :1]).logits
    put_weights(served, rest, deltas)
    assert torch.equal(served(TOKENS[:, :1]).logits, one)
    assert not torch.equal(served(TOKENS).logits, merged(TOKENS).logits)


def test_merging_exact_deltas_gives_the_expert(pair):
    deltas = {name: pair.inputs.delta(name) for name in pair.inputs.linears()}
    merged = merged_weights(pair.inputs.base, pair.inputs.expert, deltas)
    assert all(torch.equal(merged[key], value) for key, value in pair.inputs.expert.items())


@pytest.mark.parametrize("numerics", sorted(LEVELS))
def test_activations_are_rounded_to_levels_of_each_tile(numerics):
    x = torch.randn(3, 2500, generator=torch.Generator().manual_seed(0))
    rounded = rounded_activations(x, LEVELS[numerics])
    for tile in range(0, 2500, 1024):
        part = slice(tile, tile + 1024)
        unit = x[:, part].abs().amax(1, keepdim=True) / LEVELS[numerics]
        assert ((rounded - x)[:, part].abs() <= unit * 0.501).all()
        levels = rounded[:, part] / unit
        torch.testing.assert_close(levels, levels.round(), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_rounding_touches_the_delta_alone(pair, served):
    deltas = {name: pair.inputs.delta(name) for name in pair.inputs.linears()}
    base = {f"{name}.weight": pair.inputs.base[f"{name}.weight"] for name in deltas}
    weights = {**pair.inputs.expert, **base}
    put_weights(served, weights, deltas)
    exact = served(TOKENS).logits
    put_weights(served, weights, deltas, levels=3)
    assert not torch.equal(served(TOKENS).logits, exact)
    put_weights(served, weights, {}, levels=3)
    rounded = served(TOKENS).logits
    put_weights(served, weights, {})
    assert torch.equal(served(TOKENS).logits, rounded)
