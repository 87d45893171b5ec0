"""The methods: small independent computations, bytes against repos really written, and training that helps."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from benchmarks.quality.calibration import collect_moments
from benchmarks.quality.measures import reference_states
from benchmarks.quality.methods import METHODS, merged_weights, rest_bytes
from benchmarks.quality.methods.distillation import _Weight, distil
from benchmarks.quality.methods.low_rank import (
    mixed_precision_svd,
    quantize_vectors,
    singular_vectors,
    truncated_svd,
    vector_bytes,
)
from benchmarks.quality.methods.ours import StateParameters, linear_budget, ours
from benchmarks.quality.methods.stepped import bitdelta, compress_stepped, round_matrix, rounded
from transformers_meswitch import MESwitchConfig, compress
from transformers_meswitch.compression import recipe
from transformers_meswitch.compression.batches import CalibrationBatches
from transformers_meswitch.compression.batches import pack as batched
from transformers_meswitch.compression.linear import reconstruct_linear
from transformers_meswitch.compression.packing import pack
from transformers_meswitch.delta_format.reader import open_delta
from transformers_meswitch.delta_format.spec import tensor_key


def relative_error(inputs, compressed) -> float:
    lost = sum((inputs.delta(name) - delta).square().sum() for name, delta in compressed.deltas.items())
    return float(lost / sum(inputs.delta(name).square().sum() for name in compressed.deltas))


def test_moments_are_those_of_the_inputs_without_padding(pair):
    inputs, found = pair.inputs, {}
    name = "model.layers.1.mlp.down_proj"
    handle = inputs.model.get_submodule(name).register_forward_pre_hook(lambda _, args: found["x"].append(args[0][0]))
    found["x"] = []
    with torch.no_grad():
        for parameter, value in inputs.model.named_parameters():
            value.copy_(inputs.expert[parameter])
        for ids, _ in inputs.sequences:
            inputs.model.base_model(input_ids=torch.tensor([ids]))
    handle.remove()
    x = torch.cat(found["x"]).float()
    torch.testing.assert_close(inputs.moments[name], x.T @ x / len(x), rtol=2e-2, atol=1e-4)
    assert set(inputs.moments) == set(inputs.linears())
    batched = collect_moments(inputs.model, inputs.sequences, batch_size=3)
    torch.testing.assert_close(batched[name], inputs.moments[name], rtol=2e-2, atol=1e-4)


def test_rounding_finds_the_best_step_of_a_row():
    torch.manual_seed(0)
    delta = torch.randn(5, 40)
    delta[3] = 0
    found = round_matrix(delta, 2, 0, score=lambda d, _: d.abs().amax(dim=0))
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    for row in (0, 1, 2, 4):
        best = min(
            float((delta[row][:, None] - levels * step).abs().min(dim=1).values.square().sum())
            for step in torch.linspace(0.05, 4, 2000)
        )
        assert float((found.delta()[row] - delta[row]).square().sum()) < 1.02 * best
    assert not found.delta()[3].any()


def test_salient_channels_are_chosen_by_what_they_are_chosen_by():
    torch.manual_seed(0)
    delta = torch.randn(16, 30)
    delta[0, 4] = 40.0  # one large value
    used = torch.ones(30)
    used[9] = 1e4  # one channel that is used much
    for score, channel in (
        (lambda d, _: d.abs().amax(dim=0), 4),
        (lambda d, given: (d - given).square().sum(dim=0) * used, 9),
    ):
        found = round_matrix(delta, 2, 1, score)
        assert found.kept is not None
        assert found.kept.any(dim=0).nonzero().tolist() == [[channel]]
        torch.testing.assert_close(found.delta()[:, channel], delta[:, channel].bfloat16().float())
        others = [i for i in range(30) if i != channel]
        alone = round_matrix(delta[:, others], 2, 0, score=lambda d, _: d.sum(dim=0))
        torch.testing.assert_close(found.delta()[:, others], alone.delta())


@pytest.mark.parametrize(("bits", "channels"), list(itertools.product((1, 2, 3), (0, 5))))
def test_codes_take_the_bytes_that_are_counted(bits, channels):
    delta = torch.randn(6, 37)
    found = round_matrix(delta, bits, channels, lambda d, _: d.abs().amax(dim=0))
    coded = found.levels[:, found.levels.any(dim=0)]
    assert coded.shape[1] == 37 - channels
    codes = ((coded.int() + 2**bits - 1) // 2).to(torch.uint8)
    assert int(codes.max()) < 2**bits
    assert found.bytes() == pack(codes, bits).numel() + 6 * 4 + channels * (6 * 2 + 4)


def test_bitdelta_is_the_sign_times_the_mean(pair):
    layers = bitdelta(pair.inputs)
    compressed = compress_stepped(layers)
    size = 0
    for name, delta in compressed.deltas.items():
        expected = pair.inputs.delta(name)
        signs = torch.where(expected > 0, 1.0, -1.0)
        torch.testing.assert_close(delta, signs * expected.abs().mean())
        size += expected.shape[0] * -(-expected.shape[1] // 8) + 2
    assert compressed.linear_bytes == size


def test_singular_vectors_are_those_of_an_svd():
    torch.manual_seed(0)
    for shape in ((12, 20), (20, 12), (9, 9)):
        delta = torch.randn(shape)
        left, right = singular_vectors(delta)
        torch.testing.assert_close(left @ right, delta, rtol=1e-4, atol=1e-4)
        u, s, v = torch.linalg.svd(delta)
        torch.testing.assert_close(left[:, :4] @ right[:4], u[:, :4] * s[:4] @ v[:4], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [truncated_svd, mixed_precision_svd])
def test_low_rank_stays_in_its_bytes_and_gains_from_more(pair, method):
    small, large = (linear_budget(pair.inputs, bits, 0) for bits in (2, 4))
    results = [method(pair.inputs, budget) for budget in (small, large)]
    for result, budget in zip(results, (small, large), strict=True):
        assert 0 < result.linear_bytes <= sum(budget.values())
    assert relative_error(pair.inputs, results[1]) < relative_error(pair.inputs, results[0]) < 1


def test_vectors_are_rounded_in_groups_to_few_values():
    torch.manual_seed(0)
    vectors = torch.randn(3, 300)
    for bits in (2, 3, 8):
        found = quantize_vectors(vectors, bits)
        for start in (0, 128, 256):
            assert len(found[1, start : start + 128].unique()) <= 2**bits
        assert float((found - vectors).square().mean()) < {2: 0.14, 3: 0.05, 8: 1e-3}[bits]
    assert vector_bytes(300, 3) == 113 + 2 * 3


def test_the_weight_of_a_step_has_the_gradient_of_plain_arithmetic():
    torch.manual_seed(0)
    fixed, levels = torch.randn(4, 6), torch.randint(-3, 4, (4, 6), dtype=torch.int8)
    for shape in (4, 1):
        ours, plain = (torch.rand(shape, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in "ab")
        target = torch.randn(4, 6)
        one = _Weight.apply(fixed, levels, ours, torch.float32)
        other = fixed + levels.float() * (plain / 2)[:, None]
        torch.testing.assert_close(one, other)
        for weight in (one, other):
            (weight - target).square().sum().backward()
        torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("make", [bitdelta, lambda inputs: rounded(inputs, bits=2, channels=2)])
def test_distillation_brings_the_logits_nearer_and_leaves_the_codes(pair, make):
    inputs = pair.inputs
    layers = make(inputs)
    trained = distil(inputs, layers, steps=30, batch_size=8)

    def gap(found) -> float:
        states = []
        for weights in (
            dict(inputs.expert),
            merged_weights(inputs.base, inputs.expert, compress_stepped(found).deltas),
        ):
            with torch.no_grad():
                for name, parameter in inputs.model.named_parameters():
                    parameter.copy_(weights[name])
            states.append(reference_states(inputs.model, inputs.sequences))
        head = inputs.expert["model.embed_tokens.weight"]
        return float((F.linear(states[0], head).float() - F.linear(states[1], head).float()).square().mean())

    assert gap(trained) < 0.97 * gap(layers)
    for name, layer in trained.items():
        assert torch.equal(layer.levels, layers[name].levels)
        assert layer.bytes() == layers[name].bytes()
    assert any(not torch.equal(layer.step, layers[name].step) for name, layer in trained.items())


CONFIGS = [
    MESwitchConfig(bits=2, salient_channels=3),
    MESwitchConfig(bits=1, salient_channels=0, column_steps=True),
    MESwitchConfig(bits=1, salient_channels=2, layer_bits={"down_proj$": 3}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["2-bit", "column-steps", "mixed"])
def test_ours_is_the_delta_repo_that_is_written(pair, config, tmp_path):
    compress(pair.base, pair.expert, tmp_path / "delta", config, calibration=None, progress=False)
    # Inputs of which no channel is used more than another weigh as no calibration does.
    even = {name: torch.ones(len(moment)) for name, moment in pair.inputs.moments.items()}
    found = ours(dataclasses.replace(pair.inputs, moments=even), config, fit="alone")
    stored = 0
    with safe_open(tmp_path / "delta" / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a dict)
            tensor = file.get_tensor(key)
            stored += tensor.numel() * tensor.element_size()
    assert found.linear_bytes + found.rest_bytes == stored
    assert 0 < found.rest_bytes < rest_bytes(pair.inputs.base, pair.inputs.expert, pair.inputs.linears())
    weights = merged_weights(pair.inputs.base, {**pair.inputs.expert, **found.rest}, found.deltas)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "delta", dtype=torch.bfloat16)
    loaded.merge_adapter()
    merged = dict(loaded.state_dict())
    for name in [*pair.inputs.linears(), "model.embed_tokens"]:
        key = next(key for key in merged if key.startswith(f"{name}.") and key.endswith("weight"))
        assert "delta" not in key
        torch.testing.assert_close(merged[key], weights[f"{name}.weight"], rtol=1e-2, atol=1e-3)


def test_ours_is_what_is_written_with_calibration(pair, tmp_path, monkeypatch):
    config = MESwitchConfig(bits=2, salient_channels=3, embedding_bits=None)
    rows = [ids for ids, _ in pair.inputs.sequences]
    text = CalibrationBatches(tuple(batched(rows, max_length=max(map(len, rows)))), len(rows), sum(map(len, rows)))
    monkeypatch.setattr(recipe, "calibration_text", lambda *_: text)
    delta = open_delta(compress(pair.base, pair.expert, tmp_path / "delta", config, ["in its place"], progress=False))
    found = ours(pair.inputs, config).deltas
    alone = ours(pair.inputs, config, fit="alone").deltas
    for name in pair.inputs.linears():
        record = delta.records[name]
        leaves = {leaf: delta.tensor(tensor_key(name, leaf)) for leaf in record.leaves()}
        assert torch.equal(found[name], reconstruct_linear(record, leaves)), name
    assert not torch.equal(found[name], alone[name])


def test_a_budget_is_what_ours_takes(pair):
    budget = linear_budget(pair.inputs, 2, 3)
    assert sum(budget.values()) == ours(pair.inputs, MESwitchConfig(bits=2, salient_channels=3)).linear_bytes


def test_linears_that_did_not_change_take_no_bytes(pair):
    frozen = {key: pair.inputs.base[key] if "proj" in key else value for key, value in pair.inputs.expert.items()}
    found = ours(dataclasses.replace(pair.inputs, expert=frozen), MESwitchConfig(bits=2))
    assert found.linear_bytes == 0
    assert not any(delta.any() for delta in found.deltas.values())


def test_a_tied_head_is_the_embedding(pair):
    parameters = StateParameters(pair.inputs.model, pair.inputs.base)
    assert parameters.tied
    assert torch.equal(parameters.of("lm_head")["weight"], pair.inputs.base["model.embed_tokens.weight"])


#: Methods that others in the table come close to, each of which spends a budget.
ALIKE = ("ours-1.2bit", "ours-1.5bit", "preset-balanced")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ())
        for name, method in METHODS.items()
        if method.compress is not None
    ],
)
def test_every_method_comes_nearer_to_the_expert_than_the_base_is(pair, name):
    compress_it = METHODS[name].compress
    assert compress_it is not None
    # Sixteen salient channels are half of the tiny model's width, so errors are far below those of a real one.
    found = compress_it(dataclasses.replace(pair.inputs, distillation_steps=2))
    assert set(found.deltas) == set(pair.inputs.linears())
    assert found.linear_bytes > 0
    assert relative_error(pair.inputs, found) < 0.9
    weights = merged_weights(pair.inputs.base, pair.inputs.expert, found.deltas)
    assert set(weights) == set(pair.inputs.expert)
    for key, value in weights.items():
        if "proj" not in key:
            assert torch.equal(value, pair.inputs.expert[key])
