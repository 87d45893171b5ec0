from __future__ import annotations

import pytest
import torch

from transformers_meswitch.delta_format.spec import (
    LinearRecord,
    QuantizedRowsRecord,
    RowsRecord,
    ValuesRecord,
    tensor_key,
)
from transformers_meswitch.delta_format.validate import (
    check_config,
    check_headers,
    check_values,
    tensor_headers,
)
from transformers_meswitch.errors import DeltaFormatError, FormatVersionError

RECORDS = {
    "up": LinearRecord(3, 8, bits=3, salient_channels=2, column_step=True, bias=True),
    "embed": RowsRecord(num_rows=6, width=2, rows=2),
    "wte": QuantizedRowsRecord(9, 4, bits=3, coded_rows=3, exact_rows=2, salient_channels=1),
    "norm": ValuesRecord({"weight": (2,)}),
}


def tensors():
    return {
        tensor_key("up", "codes"): torch.tensor([[255, 255, 3]] * 3, dtype=torch.uint8),
        tensor_key("up", "step"): torch.tensor([0.0, 1.0, 2.0]),
        tensor_key("up", "column_step"): torch.ones(6),
        tensor_key("up", "salient_index"): torch.tensor([0, 7], dtype=torch.int32),
        tensor_key("up", "salient"): torch.ones(3, 2, dtype=torch.bfloat16),
        tensor_key("up", "bias"): torch.ones(3, dtype=torch.float16),
        tensor_key("embed", "row_index"): torch.tensor([0, 5], dtype=torch.int32),
        tensor_key("embed", "rows"): torch.ones(2, 2),
        tensor_key("wte", "row_index"): torch.tensor([0, 3, 6], dtype=torch.int32),
        tensor_key("wte", "codes"): torch.tensor([[255, 1]] * 3, dtype=torch.uint8),
        tensor_key("wte", "step"): torch.tensor([0.0, 1.0, 2.0]),
        tensor_key("wte", "salient_index"): torch.tensor([2], dtype=torch.int32),
        tensor_key("wte", "salient"): torch.ones(3, 1, dtype=torch.bfloat16),
        tensor_key("wte", "exact_index"): torch.tensor([1, 8], dtype=torch.int32),
        tensor_key("wte", "rows"): torch.ones(2, 4),
        tensor_key("norm", "values.weight"): torch.ones(2),
    }


def check(changed):
    check_headers(RECORDS, tensor_headers(changed))
    check_values(RECORDS, changed.__getitem__)


def test_a_valid_delta_passes():
    check(tensors())


def with_value(module, leaf, place, value):
    changed = tensors()
    changed[tensor_key(module, leaf)][place] = value
    return changed


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("module", "leaf", "place", "value", "message"),
    [
        ("up", "step", 1, NAN, r"up\.meswitch_delta\.step is nan at \[1\], expected finite"),
        ("up", "step", 2, INF, r"step is inf at \[2\], expected finite"),
        ("up", "step", 0, -1.0, r"step is -1\.0 at \[0\], expected step sizes of at least 0"),
        ("up", "column_step", 5, -INF, r"column_step is -inf at \[5\]"),
        ("up", "salient", (2, 1), INF, r"salient is inf at \[2, 1\]"),
        ("up", "bias", 0, NAN, r"bias is nan at \[0\]"),
        ("embed", "rows", (1, 0), NAN, r"embed\.meswitch_delta\.rows is nan at \[1, 0\]"),
        ("norm", "values.weight", 1, INF, r"values\.weight is inf at \[1\]"),
        ("up", "salient_index", 1, 8, "salient_index holds 8, expected indices from 0 to 7"),
        ("up", "salient_index", 0, -1, "salient_index holds -1, expected"),
        ("up", "salient_index", 1, 0, "salient_index goes from 0 to 0 at 0, expected strictly ascending"),
        ("embed", "row_index", 0, 5, "row_index goes from 5 to 5 at 0, expected strictly"),
        ("embed", "row_index", 1, 6, "row_index holds 6, expected indices from 0 to 5"),
        ("wte", "row_index", 1, 0, "row_index goes from 0 to 0 at 0, expected strictly"),
        ("wte", "row_index", 2, 9, "row_index holds 9, expected indices from 0 to 8"),
        (
            "wte",
            "row_index",
            2,
            8,
            r"row_index and .*wte.*exact_index both hold 8, expected a row to be coded or exact",
        ),
        ("wte", "exact_index", 0, 8, "exact_index goes from 8 to 8 at 0, expected strictly"),
        ("wte", "exact_index", 1, -1, "exact_index holds -1, expected indices from 0 to 8"),
        ("wte", "salient_index", 0, 4, "salient_index holds 4, expected indices from 0 to 3"),
        ("wte", "step", 2, -1.0, r"wte.*step is -1\.0 at \[2\], expected step sizes of at least 0"),
        ("wte", "salient", (1, 0), NAN, r"wte.*salient is nan at \[1, 0\]"),
        ("wte", "rows", (1, 3), INF, r"wte.*rows is inf at \[1, 3\]"),
        ("wte", "codes", (2, 1), 2, "codes has bits set past bit 9 of row 2, expected zeros"),
        ("up", "codes", (1, 2), 7, "codes has bits set past bit 18 of row 1, expected zeros"),
    ],
)
def test_values_out_of_range(module, leaf, place, value, message):
    with pytest.raises(DeltaFormatError, match=message):
        check(with_value(module, leaf, place, value))


def test_values_are_checked_past_the_first_chunk(monkeypatch):
    monkeypatch.setattr("transformers_meswitch.delta_format.validate._CHUNK", 3)
    with pytest.raises(DeltaFormatError, match=r"salient is nan at \[2, 0\]"):
        check(with_value("up", "salient", (2, 0), NAN))


def test_empty_tensors_are_valid():
    records = {"a": LinearRecord(0, 4, 2), "b": LinearRecord(2, 2, 1, salient_channels=2), "c": RowsRecord(4, 2, 0)}
    records |= {"d": QuantizedRowsRecord(4, 2, 3, 0), "e": QuantizedRowsRecord(2, 2, 3, 0, 2)}
    given = {}
    dtypes = {"U8": torch.uint8, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16, None: torch.float16}
    for module, record in records.items():
        for leaf, (dtype, shape) in record.leaves().items():
            given[tensor_key(module, leaf)] = torch.zeros(shape, dtype=dtypes[dtype])
    for key in (tensor_key("b", "salient_index"), tensor_key("e", "exact_index")):
        given[key] = torch.tensor([0, 1], dtype=torch.int32)
    check_headers(records, tensor_headers(given))
    check_values(records, given.__getitem__)


def test_headers_name_every_offender():
    changed = tensors()
    del changed[tensor_key("up", "step")]
    changed["stray"] = torch.ones(1)
    changed[tensor_key("up", "codes")] = torch.ones(3, 4, dtype=torch.int8)
    changed[tensor_key("norm", "values.weight")] = torch.ones(2, dtype=torch.int32)
    with pytest.raises(DeltaFormatError) as caught:
        check(changed)
    message = str(caught.value)
    for expected in (
        "base_model.model.up.meswitch_delta.step is missing, expected F32 [3]",
        "stray is not announced by the modules table",
        "up.meswitch_delta.codes has dtype torch.int8, expected U8",
        "up.meswitch_delta.codes has shape [3, 4], expected [3, 3]",
        "values.weight has dtype I32, expected F16 or BF16 or F32 or F64",
        "compress the expert again",
    ):
        assert expected in message


def test_long_lists_are_cut():
    with pytest.raises(DeltaFormatError, match="and 80 more"):
        check_headers({}, {f"t{i}": ("F32", ()) for i in range(100)})


ROWS = {"kind": "quantized_rows", "num_rows": 4, "width": 2, "bits": 3, "coded_rows": 2}


def config(**changes):
    good = {
        "peft_type": "MESWITCH",
        "format_version": 2,
        "base_model_name_or_path": "me/base",
        "modules": {"lm_head": {"kind": "rows", "num_rows": 4, "width": 2, "rows": 1}},
        "a_field_of_a_later_release": {"x": 1},
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not ...}


def test_config_gives_the_records():
    assert check_config(config()) == check_config(config(format_version=1)) == {"lm_head": RowsRecord(4, 2, 1)}
    assert check_config(config(modules={"m": ROWS})) == {"m": QuantizedRowsRecord(4, 2, 3, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA', expected 'MESWITCH'"),
        ({"peft_type": ...}, "peft_type is None"),
        ({"format_version": ...}, "format_version is None, expected an integer"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": 0}, "format_version is 0"),
        ({"base_model_name_or_path": ...}, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": "  "}, "base_model_name_or_path is '  '"),
        ({"base_model_name_or_path": ["me/base"]}, "base_model_name_or_path is"),
        ({"modules": ...}, "modules is None, expected an object with at least one module"),
        ({"modules": {}}, r"modules is \{\}"),
        ({"modules": []}, r"modules is \[\]"),
        ({"modules": {"norm": {"kind": "values", "shapes": {}}}}, r"modules\['norm'\] announces no tensors"),
        ({"modules": {"norm": {"kind": "values", "shapes": {"../w": [1]}}}}, "expected plain names"),
        ({"modules": {"norm": {"kind": "other"}}}, "of kind 'other'"),
        ({"modules": {"m": ROWS}, "format_version": 1}, r"modules\['m'\] is of kind 'quantized_rows', which format v"),
        ({"modules": {"m": {**ROWS, "bits": 5}}}, "bits=5; supported are"),
        ({"modules": {"m": {**ROWS, "bits": True}}}, r"\['bits'\] is True"),
        ({"modules": {"m": {**ROWS, "coded_rows": -1}}}, r"\['coded_rows'\] is -1"),
        ({"modules": {"m": {**ROWS, "exact_rows": 3}}}, "stores 2 coded and 3 exact rows of a matrix of 4"),
        ({"modules": {"m": {**ROWS, "salient_channels": 3}}}, "3 salient channels but only 2 input channels"),
        ({"vocab_size": -1}, "vocab_size is -1, expected at least 0"),
        ({"vocab_size": "7"}, "vocab_size is '7', expected int or null"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected bool"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is"),
        ({"eos_token_id": 2}, "eos_token_id is 2, expected list"),
        ({"base_fingerprint": "abc"}, "base_fingerprint is 'abc'"),
        ({"revision": 1}, "revision is 1"),
        ({"distilled": True}, "distilled is True, expected dict or null"),
        ({"distilled": {"steps": "9", "text": "a", "kl_before": 1, "kl_after": 0.5}}, r"distilled\['steps'\] is '9'"),
        ({"distilled": {"steps": 9, "text": "a", "kl_before": 1.0}}, r"distilled\['kl_after'\] is None"),
        ({"calibration": "default"}, "calibration is 'default', expected dict or null"),
        ({"calibration": {"samples": 9}}, r"calibration\['source'\] is None, expected str"),
        ({"calibration": {"source": "default", "samples": True}}, r"calibration\['samples'\] is True, expected int"),
        (
            {"calibration": {"source": "a.txt", "samples": 9, "sha256": 0}},
            r"calibration\['sha256'\] is 0, expected str",
        ),
        ({"imported_from": 1}, "imported_from is 1, expected str or null"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(DeltaFormatError, match=message):
        check_config(config(**changes))


def test_later_version_is_told_before_anything_else():
    with pytest.raises(FormatVersionError, match="format version 3"):
        check_config({"peft_type": "MESWITCH", "format_version": 3, "modules": "changed in version 3"})


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "a.", "../x", "a/b", "a\\b", "a b", "a\0", "..", "x.meswitch_delta.y", "ä", "a\n"]
)
def test_module_names_that_are_not_module_paths(name):
    with pytest.raises(DeltaFormatError, match="expected a dotted module path"):
        check_config(config(modules={name: {"kind": "rows", "num_rows": 4, "width": 2, "rows": 1}}))
