"""Each kind of module: what is stored, and what is refused by name."""

import pytest
import torch

from transformers_meswitch import configuration
from transformers_meswitch.compression.linear import reconstruct_linear
from transformers_meswitch.compression.modules import compress_module
from transformers_meswitch.delta_format.spec import LinearRecord, RowsRecord, ValuesRecord
from transformers_meswitch.errors import CompressionError

CONFIG = configuration.MESwitchConfig("base", bits=2, salient_channels=2, layer_bits={r"down_proj$": 3})


def compress(kind, base, expert, name="m", config=CONFIG, **more):
    return compress_module(kind, base, expert, name=name, config=config, **more)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_linear_with_bias_and_bits_by_layer():
    base = {"weight": randn(6, 10), "bias": randn(6)}
    expert = {"weight": randn(6, 10, seed=1), "bias": randn(6, seed=2).to(torch.bfloat16)}
    record, tensors = compress("linear", base, expert, "model.layers.0.mlp.down_proj")
    assert record == LinearRecord(6, 10, 3, 2, bias=True)
    assert torch.equal(tensors["bias"], expert["bias"])
    assert set(tensors) == set(record.leaves())
    record, tensors = compress("linear", base, base | {"weight": expert["weight"]}, "up_proj")
    assert (record.bits, record.bias, "bias" in tensors) == (2, False, False)


def test_only_the_bias_changed():
    base = {"weight": randn(6, 10), "bias": randn(6)}
    record, tensors = compress("linear", base, base | {"bias": randn(6, seed=1)})
    assert record.bias
    assert not reconstruct_linear(record, tensors).any()


@pytest.mark.parametrize("kind", ["linear", "rows", "values"])
def test_unchanged_is_none_across_dtypes(kind):
    half = {"weight": randn(6, 10, dtype=torch.bfloat16), "bias": randn(6, dtype=torch.bfloat16)}
    full = {key: value.float() for key, value in half.items()}
    assert compress(kind, half, half) is None
    assert compress(kind, half, full) is None
    assert compress(kind, full, half) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "rows", "values"])
def test_a_copy_in_fewer_bits_is_no_change(kind, dtype):
    full = {"weight": randn(6, 10), "bias": randn(6)}
    rounded = {key: value.to(dtype) for key, value in full.items()}
    assert not torch.equal(rounded["weight"].float(), full["weight"])
    assert compress(kind, full, rounded) is None
    rounded["weight"][3, 4] *= 1.1
    record, _ = compress(kind, full, rounded)
    assert record.kind.endswith(kind)


def test_a_rounded_weight_beside_another_bias_is_no_change_either():
    full = {"weight": randn(6, 10), "bias": randn(6)}
    record, tensors = compress(
        "linear", full, {key: value.bfloat16() for key, value in full.items()} | {"bias": randn(6, seed=1)}
    )
    assert record.bias
    assert not reconstruct_linear(record, tensors).any()


def test_delta_is_formed_in_float32():
    base = {"weight": torch.full((1, 1), 1.0, dtype=torch.bfloat16)}
    expert = {"weight": torch.full((1, 1), 1.0 + 2**-12)}
    record, tensors = compress("linear", base, expert, config=configuration.MESwitchConfig("base", salient_channels=0))
    assert reconstruct_linear(record, tensors).item() == 2**-12


def test_conv1d_is_transposed():
    base, expert = {"weight": randn(10, 6)}, {"weight": randn(10, 6, seed=1)}
    record, tensors = compress("linear", base, expert, is_conv1d=True)
    other_record, other = compress("linear", {"weight": base["weight"].T}, {"weight": expert["weight"].T})
    assert record == other_record == LinearRecord(6, 10, 2, 2)
    assert all(torch.equal(tensors[leaf], other[leaf]) for leaf in tensors)


def test_rows_changed_and_added():
    base, expert = randn(5, 4, dtype=torch.bfloat16), randn(7, 4, dtype=torch.bfloat16)
    expert[:5] = base
    expert[2, 3] += 1
    base[4, 0], expert[4, 0] = 0.0, -0.0
    record, tensors = compress("rows", {"weight": base}, {"weight": expert})
    assert record == RowsRecord(7, 4, 4)
    assert tensors["row_index"].tolist() == [2, 4, 5, 6]
    assert tensors["row_index"].dtype == torch.int32
    assert torch.equal(tensors["rows"], expert[[2, 4, 5, 6]])
    assert tensors["rows"].dtype == torch.bfloat16


def test_rows_removed_are_recorded_without_rows():
    record, tensors = compress("rows", {"weight": randn(5, 4)}, {"weight": randn(5, 4)[:3]})
    assert record == RowsRecord(3, 4, 0)
    assert tensors["rows"].shape == (0, 4)


def test_values_store_only_what_differs():
    base = {"weight": torch.ones(4), "bias": torch.zeros(4)}
    record, tensors = compress("values", base, {"weight": torch.ones(4) * 2, "bias": torch.zeros(4)})
    assert record == ValuesRecord({"weight": (4,)})
    assert set(tensors) == {"values.weight"}


@pytest.mark.parametrize("kind", ["linear", "rows", "values"])
@pytest.mark.parametrize("whose", ["base", "expert"])
def test_non_finite_names_the_tensor_and_whose(kind, whose):
    good, bad = {"weight": randn(3, 4)}, {"weight": randn(3, 4)}
    bad["weight"][1, 1] = float("nan")
    pair = (bad, good) if whose == "base" else (good, bad)
    with pytest.raises(CompressionError, match=rf"layers\.1\.x\.weight of the {whose} holds NaN"):
        compress(kind, *pair, name="layers.1.x")


def test_another_architecture_is_refused():
    weight = {"weight": randn(3, 4)}
    with pytest.raises(CompressionError, match=r"m\.weight has shape \(3, 5\) in the expert but \(3, 4\) in the base"):
        compress("linear", weight, {"weight": randn(3, 5)})
    with pytest.raises(CompressionError, match=r"m\.weight has shape \(4, 5\) in the expert but \(3, 4\)"):
        compress("rows", weight, {"weight": randn(4, 5)})
    with pytest.raises(
        CompressionError, match=r"m has parameters \['bias', 'weight'\] in the expert but \['weight'\]"
    ):
        compress("linear", weight, weight | {"bias": randn(3)})
    with pytest.raises(CompressionError, match=r"m\.weight of the expert is torch\.uint8"):
        compress("linear", weight, {"weight": torch.zeros(3, 4, dtype=torch.uint8)})


def test_float64_is_stored_as_float32():
    record, tensors = compress("values", {"weight": torch.ones(4)}, {"weight": torch.full((4,), 2.0).double()})
    assert record == ValuesRecord({"weight": (4,)})
    assert tensors["values.weight"].dtype == torch.float32
