"""The benchmark's served model against the package's own layers on a delta that was written and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.methods import merged_weights
from benchmarks.quality.methods.ours import ours
from benchmarks.quality.serving import prepare_serving, put_weights
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
