"""Embedding and head rows: what is coded, what stays exact, and that base + stored rows are the expert's."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures_models import change_rows
from transformers_meswitch.compression.rows import coded_index, compress_rows, rows_record
from transformers_meswitch.configuration import MESwitchExpertConfig
from transformers_meswitch.delta_format.reader import check_delta, open_delta
from transformers_meswitch.delta_format.spec import (
    QuantizedRowsRecord,
    RowsRecord,
    parse_record,
    record_bytes,
    tensor_key,
)
from transformers_meswitch.delta_format.validate import check_headers, check_values, tensor_headers
from transformers_meswitch.delta_format.writer import write_delta


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compress(base, expert, bits=3, salient=0, **more):
    base, expert = ({"weight": one} if isinstance(one, torch.Tensor) else one for one in (base, expert))
    return compress_rows(base, expert, bits=bits, salient_channels=salient, **more)


def test_changed_rows_are_coded_and_added_ones_exact():
    base, expert = randn(8, 40, dtype=torch.bfloat16), randn(10, 40, dtype=torch.bfloat16)
    expert[:8] = base
    expert[[2, 5]] += randn(2, 40, seed=1).bfloat16()
    expert[2, :3] = 0
    record, tensors = compress(base, expert, salient=3)
    assert record == QuantizedRowsRecord(10, 40, 3, coded_rows=2, exact_rows=2, salient_channels=3)
    assert tensors["row_index"].tolist() == [2, 5]
    assert tensors["exact_index"].tolist() == [8, 9]
    assert torch.equal(tensors["rows"], expert[8:])
    assert tensors["rows"].dtype == torch.bfloat16


def test_the_index_is_left_out_where_every_row_is_stored():
    record, tensors = compress(randn(8, 40), randn(11, 40, seed=1))
    assert (record.coded_rows, record.exact_rows, record.has_row_index) == (8, 3, False)
    assert "row_index" not in tensors
    assert coded_index(record, tensors).tolist() == list(range(8))


@pytest.mark.parametrize("bits", [None, 4])
def test_what_does_not_pay_stays_exact(bits):
    base, expert = randn(20, 6, dtype=torch.bfloat16), randn(20, 6, dtype=torch.bfloat16)
    assert compress(base, expert, bits) is None
    expert[3] += 1
    # 4 bits: 3 bytes of codes, 4 of a step; with one salient channel 4 + 2 more; exact 12.
    kind = "rows" if bits is None else "quantized_rows"
    assert compress(base, expert, bits)[0].kind == kind
    record, tensors = compress(base, expert, bits, salient=2)
    assert record == RowsRecord(20, 6, 1)
    assert torch.equal(tensors["rows"], expert[[3]])


def test_rows_removed_and_biases():
    weight, bias = randn(9, 40), randn(9)
    base = {"weight": weight, "bias": bias}
    assert compress(base, base) is None
    record, tensors = compress(base, {"weight": weight[:5], "bias": bias[:5]})
    assert record == RowsRecord(5, 40, 0, bias=True)
    record, tensors = compress(base, {"weight": weight + 0.1, "bias": bias})
    assert (record.coded_rows, record.bias) == (9, False)
    record, tensors = compress(base, {"weight": (weight + 0.1)[:7], "bias": randn(7)})
    assert (record.num_rows, record.coded_rows, record.exact_rows, record.bias) == (7, 7, 0, True)
    assert torch.equal(tensors["bias"], randn(7))


def test_the_second_moment_chooses_the_salient_channels():
    moment = torch.zeros(40)
    moment[[3, 30]] = 1.0
    plain = compress(randn(50, 40), randn(50, 40, seed=1), salient=2)[1]
    weighed = compress(randn(50, 40), randn(50, 40, seed=1), salient=2, second_moment=moment)[1]
    assert weighed["salient_index"].tolist() == [3, 30] != plain["salient_index"].tolist()


def test_the_smaller_record_is_chosen_to_the_byte():
    for width in range(1, 12):
        record = rows_record(9, width, 7, 2, bits=3, salient_channels=2, own_bytes=2)
        salient = min(2, width)
        coded = 7 * (-(-(width - salient) * 3 // 8) + 4 + 2 * salient) + 4 * salient + 2 * (4 + 2 * width)
        exact = 9 * (4 + 2 * width)
        assert record_bytes(record, 2) == min(coded, exact)
        assert (record.kind == "quantized_rows") == (coded < exact)


@st.composite
def pairs(draw):
    """A base's and an expert's matrix, dtypes included: rows changed, added or removed."""
    dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    base_rows, num_rows, width = draw(st.integers(1, 12)), draw(st.integers(1, 14)), draw(st.integers(1, 40))
    base = randn(base_rows, width, seed=draw(st.integers(0, 99)), dtype=draw(dtype))
    expert = randn(num_rows, width, seed=draw(st.integers(100, 199)), dtype=draw(dtype))
    kept = draw(st.lists(st.integers(0, min(base_rows, num_rows) - 1)))
    expert[kept] = base[kept].to(expert.dtype)
    return base, expert


@settings(max_examples=60, deadline=None)
@given(pair=pairs(), bits=st.integers(1, 4), salient=st.integers(0, 6), own_bias=st.booleans())
def test_record_and_leaves_survive_the_disk(tmp_path_factory, pair, bits, salient, own_bias):
    base, expert = ({"weight": weight} for weight in pair)
    if own_bias:
        base["bias"], expert["bias"] = torch.zeros(len(base["weight"])), torch.ones(len(expert["weight"]))
    result = compress(base, expert, bits, salient)
    if result is None:
        assert torch.equal(base["weight"].to(expert["weight"]), expert["weight"])
        return
    record, leaves = result
    assert parse_record("m", asdict(record)) == record
    records, stored = {"m": record}, {tensor_key("m", leaf): tensor for leaf, tensor in leaves.items()}
    check_headers(records, tensor_headers(stored))
    check_values(records, stored.__getitem__)
    config = MESwitchExpertConfig(base_model_name_or_path="me/base", modules={"m": asdict(record)})
    again = open_delta(write_delta(tmp_path_factory.mktemp("delta"), config, stored))
    check_delta(again)
    assert again.records == records
    leaves = {leaf: again.tensor(tensor_key("m", leaf)).clone() for leaf in leaves}
    assert all(torch.equal(leaves[leaf], stored[tensor_key("m", leaf)]) for leaf in leaves)
    if own_bias:
        assert torch.equal(leaves["bias"], expert["bias"])

    shared = min(map(len, pair))
    whole = torch.zeros(expert["weight"].shape)
    whole[:shared] = pair[0][:shared].float()
    before = whole.clone()
    if isinstance(record, RowsRecord):
        whole[leaves["row_index"].long()] = leaves["rows"].float()
        assert torch.equal(whole.to(pair[1].dtype), pair[1])
        return
    change_rows(whole, asdict(record), leaves)
    index = coded_index(record, leaves)
    exact = [row for row in range(record.num_rows) if row not in set(index.tolist())]
    assert torch.equal(whole[exact].to(pair[1].dtype), pair[1][exact])
    # A coded row is nearer to the expert's than the base's was: at its best step, no code is worse than none.
    lost, missed = ((rows[index] - pair[1][index].float()).square().sum(1) for rows in (whole, before))
    assert bool((lost <= missed * (1 + 1e-5) + 1e-12).all())
    # Salient channels alone would not do.
    if record.coded_channels > 8:
        assert float(lost.sum()) < 0.7 * float(missed.sum())
