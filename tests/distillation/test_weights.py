"""The trained delta of one linear against a dense one in float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures_models import dense_delta
from transformers_meswitch.compression.packing import pack
from transformers_meswitch.delta_format.spec import LinearRecord
from transformers_meswitch.distillation.weights import TrainedDelta, add_to_linears


def random_leaves(record, seed):
    generator = torch.Generator().manual_seed(seed)

    def positive(n):
        return torch.rand(n, generator=generator) + 0.1

    out, coded, salient = record.out_features, record.coded_channels, record.salient_channels
    codes = torch.randint(0, 2**record.bits, (out, coded), generator=generator, dtype=torch.uint8)
    leaves = {"codes": pack(codes, record.bits), "step": positive(out)}
    if record.column_step:
        leaves["column_step"] = positive(coded)
    if salient:
        index = torch.randperm(record.in_features, generator=generator)[:salient].sort().values
        leaves["salient_index"] = index.to(torch.int32)
        leaves["salient"] = torch.randn(out, salient, generator=generator).to(torch.bfloat16)
    return leaves


def reference(record, leaves, x, factors):
    """``x Δ̂ᵀ`` in float64 from the format's definition; ``factors`` are the trained numbers."""
    unit = {**leaves, "step": torch.ones(record.out_features), "column_step": torch.ones(record.coded_channels)}
    salient = record.salient_channels
    unit["salient"] = torch.zeros(record.out_features, salient)
    fields = {"in_features": record.in_features, "out_features": record.out_features, "bits": record.bits}
    delta = dense_delta(fields, unit if salient else {k: v for k, v in unit.items() if "salient" not in k}).double()
    delta = delta * (leaves["step"].double() * factors["log_step"].exp())[:, None]
    index = leaves.get("salient_index", torch.zeros(0)).long().tolist()
    others = [i for i in range(record.in_features) if i not in index]
    if record.column_step:
        column = torch.ones(record.in_features, dtype=torch.float64)
        column = column.index_copy(
            0, torch.tensor(others), leaves["column_step"].double() * factors["log_column_step"].exp()
        )
        delta = delta * column
    if salient:
        stored = leaves["salient"].double()
        columns = stored + factors["salient_shift"] * stored.square().mean(dim=0).sqrt()
        delta = delta.index_copy(1, torch.tensor(index), columns)
    return x @ delta.T


records = st.builds(
    LinearRecord,
    out_features=st.integers(1, 9),
    in_features=st.integers(4, 19),
    bits=st.integers(1, 4),
    salient_channels=st.integers(0, 3),
    column_step=st.booleans(),
)


@given(records, st.integers(0, 99))
def test_values_and_gradients_are_autograds_on_the_dense_delta(record, seed):
    leaves = random_leaves(record, seed)
    delta = TrainedDelta(record, leaves)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, record.in_features, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, record.out_features, generator=generator, dtype=torch.float64)
    factors = {name: p.detach().double().requires_grad_() for name, p in delta.named_parameters()}
    assert set(factors) == {
        "log_step",
        *(["log_column_step"] if record.column_step else []),
        *(["salient_shift"] if record.salient_channels else []),
    }
    mine = delta(x)
    expected = reference(record, leaves, x, factors)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((mine * weights).sum(), [x, *delta.parameters()])
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *factors.values()])
    for found, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)


def test_a_wrong_level_would_be_found():
    """The comparison above sees one code in a hundred that is another level."""
    record = LinearRecord(out_features=5, in_features=20, bits=2)
    leaves = random_leaves(record, 0)
    delta = TrainedDelta(record, leaves)
    leaves["codes"] = leaves["codes"].clone()
    leaves["codes"][0, 0] ^= 1
    x = torch.randn(8, 20, dtype=torch.float64)
    factors = {"log_step": torch.zeros(5, dtype=torch.float64, requires_grad=True)}
    expected = reference(record, leaves, x, factors)
    (wanted,) = torch.autograd.grad(expected.sum(), [factors["log_step"]])
    (found,) = torch.autograd.grad(delta(x).sum(), [delta.log_step])
    assert not torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_an_accelerators_gradients_are_the_cpus(bits, dtype, tolerance):
    record = LinearRecord(out_features=96, in_features=200, bits=bits, salient_channels=3, column_step=True)
    leaves = random_leaves(record, bits)
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        delta = TrainedDelta(record, {leaf: tensor.to(device) for leaf, tensor in leaves.items()})
        given_x = x.to(device, kind).requires_grad_()
        loss = (delta(given_x) * weights.to(device, kind)).sum()
        found.append(torch.autograd.grad(loss, [given_x, *delta.parameters()]))
    for right, ours in zip(*found, strict=True):
        error = (ours.double().cpu() - right.double()).norm() / right.double().norm()
        assert float(error) < tolerance


@given(records, st.integers(0, 99))
def test_untrained_leaves_are_the_stored_ones_bit_for_bit(record, seed):
    leaves = random_leaves(record, seed)
    found = TrainedDelta(record, leaves).leaves()
    assert set(found) == set(leaves)
    for leaf, tensor in leaves.items():
        assert found[leaf].dtype == tensor.dtype
        assert torch.equal(found[leaf], tensor)


@given(records, st.integers(0, 99))
def test_what_is_trained_is_what_is_stored(record, seed):
    """The forward pass, salient columns rounded, is that of the leaves; codes and indices never change."""
    leaves = random_leaves(record, seed)
    delta = TrainedDelta(record, leaves)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    trained = delta.leaves()
    fields = {"in_features": record.in_features, "out_features": record.out_features, "bits": record.bits}
    x = torch.randn(4, record.in_features, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(delta(x), x @ dense_delta(fields, trained).T)
    assert all(torch.equal(trained[leaf], leaves[leaf]) for leaf in leaves if leaf in ("codes", "salient_index"))
    assert not torch.equal(trained["step"], leaves["step"])
    assert (trained["step"] > 0).all()


@pytest.mark.parametrize("train", [("steps",), ("salient",), ()])
def test_only_what_is_asked_for_is_trained(train):
    record = LinearRecord(out_features=3, in_features=8, bits=3, salient_channels=2, column_step=True)
    names = {name for name, _ in TrainedDelta(record, random_leaves(record, 0), train).named_parameters()}
    steps, salient = {"log_step", "log_column_step"}, {"salient_shift"}
    assert names == (steps if "steps" in train else set()) | (salient if "salient" in train else set())


def test_zero_rows_and_columns_stay_zero():
    record = LinearRecord(out_features=2, in_features=5, bits=2, salient_channels=1)
    leaves = random_leaves(record, 0)
    leaves["step"][0] = 0
    leaves["salient"][:] = 0
    delta = TrainedDelta(record, leaves)
    delta(torch.randn(3, 5)).square().sum().backward()
    with torch.no_grad():
        for parameter in delta.parameters():
            assert parameter.grad.isfinite().all()
            parameter.add_(1)
    assert delta.leaves()["step"][0] == 0
    assert not delta.leaves()["salient"].any()


def test_added_to_the_linears_of_a_plain_model_and_taken_off():
    record = LinearRecord(out_features=4, in_features=6, bits=2)
    delta = TrainedDelta(record, random_leaves(record, 0))
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
    before = model(x)
    handles = add_to_linears(model, {"0": delta})
    torch.testing.assert_close(model(x), before + delta(x))
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), before)
