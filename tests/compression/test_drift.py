"""The corrected delta against a least-squares solver that is given the tokens themselves."""

import dataclasses

import pytest
import torch

from transformers_meswitch.compression import drift as module
from transformers_meswitch.compression.drift import Drift, corrected_delta
from transformers_meswitch.compression.modules import compress_module
from transformers_meswitch.configuration import MESwitchConfig
from transformers_meswitch.errors import CompressionError

TOKENS, IN, OUT = 200, 12, 7


def case(seed=0, scale=1.0):
    """Expert's and drifted inputs and stream, expert's and base's weight: float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, r, weight = draw(TOKENS, IN), draw(TOKENS, OUT), draw(OUT, IN)
    own_x = x + 0.3 * draw(TOKENS, IN) + 0.2 * x.roll(1, dims=1)
    own_r = r + 0.3 * draw(TOKENS, OUT) + 0.2 * own_x[:, :OUT]
    return *(scale * t for t in (x, own_x, r, own_r)), weight, weight + 0.1 * draw(OUT, IN)


def statistics(x, own_x, r, own_r):
    second, inputs = own_x.T @ own_x / TOKENS, (x - own_x).T @ own_x / TOKENS
    return second.float(), Drift(TOKENS, inputs.float(), ((r - own_r).T @ own_x / TOKENS).float())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_it_is_the_least_squares_solution(monkeypatch, scale):
    x, own_x, r, own_r, weight, base = case(scale=scale)
    second, drift = statistics(x, own_x, r, own_r)
    # (base + T) own_x + own_r = weight x + r, a row of which is a token
    target = x @ weight.T + r - own_x @ base.T - own_r
    solved = torch.linalg.lstsq(own_x, target).solution.T
    monkeypatch.setattr(module, "_DAMPING", 0.0)
    monkeypatch.setattr(module, "_DAMPING_OF_FEW", 0.0)
    found = corrected_delta((weight - base).float(), weight.float(), second, drift)
    torch.testing.assert_close(found.double(), solved, rtol=1e-3, atol=1e-4)
    without = corrected_delta((weight - base).float(), weight.float(), second, Drift(TOKENS, drift.inputs))
    assert (without - solved).norm() > 0.1 * solved.norm(), "the stream's drift made no difference"


def test_damping_takes_little():
    x, own_x, r, own_r, weight, base = case(seed=1)
    second, drift = statistics(x, own_x, r, own_r)
    found = corrected_delta((weight - base).float(), weight.float(), second, drift).double()

    def lost(delta):
        return float((own_x @ (base + delta).T + own_r - x @ weight.T - r).square().mean())

    target = x @ weight.T + r - own_x @ base.T - own_r
    least = lost(torch.linalg.lstsq(own_x, target).solution.T)
    assert least < lost(found) < 1.001 * least < 0.9 * lost(weight - base)


def test_few_tokens_are_trusted_less():
    """The same moments, said to be of fewer tokens than there are channels, correct less."""
    x, own_x, r, own_r, weight, base = case(seed=4)
    second, drift = statistics(x, own_x, r, own_r)
    delta = (weight - base).float()
    many, few = (
        corrected_delta(delta, weight.float(), second, dataclasses.replace(drift, tokens=tokens))
        for tokens in (TOKENS, IN // 4)
    )
    assert (few - delta).norm() < 0.9 * (many - delta).norm()


def test_no_drift_is_no_correction():
    *_, weight, base = case()
    second = torch.eye(IN)
    delta = (weight - base).float()
    nothing = Drift(TOKENS, torch.zeros(IN, IN), torch.zeros(OUT, IN))
    assert torch.equal(corrected_delta(delta, weight.float(), second, nothing), delta)


def test_inputs_that_are_all_zero_give_the_delta_itself():
    delta = torch.ones(OUT, IN)
    assert corrected_delta(delta, delta, torch.zeros(IN, IN), Drift(TOKENS, torch.zeros(IN, IN))) is delta


@pytest.mark.parametrize("overflow", [torch.inf, torch.nan])
def test_inputs_that_overflow_are_told_as_without_drift(overflow):
    second = torch.full((IN, IN), overflow)
    base, expert = ({"weight": torch.full((OUT, IN), value)} for value in (1.0, 2.0))
    settings = {"name": "o", "config": MESwitchConfig(), "second_moment": second}
    for drift in (None, Drift(TOKENS, second)):
        with pytest.raises(CompressionError, match="activations overflow on the calibration text"):
            compress_module("linear", base, expert, drift=drift, **settings)


def test_directions_that_no_token_took_are_left_alone():
    """Two of the inputs are always zero: what the weights are there is not known to be wrong."""
    x, own_x, r, own_r, weight, base = case(seed=2)
    own_x[:, :2] = 0
    x[:, :2] = 0
    second, drift = statistics(x, own_x, r, own_r)
    delta = (weight - base).float()
    found = corrected_delta(delta, weight.float(), second, drift)
    torch.testing.assert_close(found[:, :2], delta[:, :2], rtol=0, atol=1e-6)
    assert (found - delta)[:, 2:].norm() > 0.1 * delta.norm()


def test_a_linear_that_did_not_change_stays_out_of_the_delta():
    """Corrections would give every linear a delta, zero bytes for an unchanged one being worth more."""
    x, own_x, r, own_r, weight, _ = case()
    second, drift = statistics(x, own_x, r, own_r)
    same = {"weight": weight.float()}
    config = MESwitchConfig(salient_channels=2)
    assert compress_module("linear", same, same, name="o", config=config, second_moment=second, drift=drift) is None


@pytest.mark.parametrize("is_conv1d", [False, True])
def test_the_corrected_delta_is_what_is_quantised(is_conv1d):
    x, own_x, r, own_r, weight, base = case(seed=3)
    second, drift = statistics(x, own_x, r, own_r)
    target = corrected_delta((weight - base).float(), weight.float(), second, drift)
    as_stored = [{"weight": (w.T if is_conv1d else w).float().contiguous()} for w in (base, weight)]
    config = MESwitchConfig(bits=4, salient_channels=IN)
    settings = {"name": "o", "config": config, "second_moment": second, "is_conv1d": is_conv1d}
    record, leaves = compress_module("linear", *as_stored, drift=drift, **settings)
    assert record.salient_channels == IN, "all channels in bfloat16, in their order"
    torch.testing.assert_close(leaves["salient"].float(), target, rtol=2**-8, atol=1e-5)
