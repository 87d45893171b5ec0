"""The record and its file: what survives a round trip, what is refused, and what a digest tells apart."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from tests.verification.records import evidence
from transformers_meswitch.errors import DeltaFormatError
from transformers_meswitch.verification.evidence import (
    Evidence,
    TextEvidence,
    WeightEvidence,
    dump_evidence,
    evidence_text_for,
    parse_evidence,
    read_evidence,
    tensors_digest,
    write_evidence,
)

PAGE = (Path(__file__).parents[2] / "docs" / "delta_format.md").read_text(encoding="utf-8")


def parsed(raw):
    return parse_evidence(json.dumps(raw, allow_nan=False).encode(), "evidence")


def test_round_trip(tmp_path):
    for written in (evidence(), evidence(text=False), evidence(kl=math.inf, perplexity_delta=math.inf)):
        write_evidence(tmp_path, written)
        assert read_evidence(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["meswitch_evidence.json"]
    assert json.loads((tmp_path / "meswitch_evidence.json").read_text())["text"]["kl"] == "Infinity"


def test_fields_of_a_later_release_are_left_out():
    raw = dump_evidence(evidence())
    assert parsed({**raw, "new": 1, "text": {**raw["text"], "new": 1}}) == evidence()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("schema_version",), True),
        (("schema_version",), None),
        (("tensors_sha256",), 3),
        (("versions",), ["torch"]),
        (("weights",), None),
        (("weights", "relative_errors"), {"a": "small"}),
        (("weights", "weights_by_bits"), {"2": 1.5}),
        (("weights", "weights_by_bits"), {"7": 1}),
        (("text",), []),
        (("text", "kl"), "large"),
        (("text", "tokens"), -1),
        (("text", "tokens"), 1.0),
        (("text", "device"), None),
    ],
)
def test_malformed(path, value):
    raw = dump_evidence(evidence())
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(DeltaFormatError, match=path[-1]):
        parsed(raw)


def test_not_json(tmp_path, caplog):
    (tmp_path / "meswitch_evidence.json").write_bytes(b"\xff{")
    assert read_evidence(tmp_path) is None
    assert "not valid JSON" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_evidence(tmp_path, evidence())

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_evidence(tmp_path, evidence(kl=9.0))
    assert read_evidence(tmp_path) == evidence()
    assert len(list(tmp_path.iterdir())) == 1


def test_digest_by_hand():
    import hashlib

    tensors = {"b": torch.tensor([[1, 2]], dtype=torch.uint8), "base_model.model.a": torch.tensor([1.0]).bfloat16()}
    fed = b"base_model.model.a|bfloat16|1|\x80\x3f" + b"base_model.model.b|uint8|1,2|\x01\x02"
    assert tensors_digest(tensors) == hashlib.sha256(fed).hexdigest()
    assert tensors_digest({"scalar": torch.tensor(1.0), "none": torch.zeros(0, 3)})


def test_digest_tells_tensors_apart():
    one = {"a": torch.zeros(2, 2, dtype=torch.uint8)}
    last = torch.zeros(2, 2, dtype=torch.uint8)
    last[1, 1] = 1
    others = [{}, {"b": one["a"]}, {"a": last}, {"a": one["a"].view(4)}, {"a": one["a"].to(torch.int8)}]
    assert len({tensors_digest(tensors) for tensors in [one, *others]}) == 6
    # How a tensor lies in memory does not matter.
    wide = torch.zeros(2, 4, dtype=torch.uint8)[:, ::2]
    assert tensors_digest({"a": wide}) == tensors_digest(one)


def test_evidence_of_other_tensors_is_not_handed_on(tmp_path, caplog):
    tensors = {"a": torch.zeros(2)}
    path = write_evidence(tmp_path, evidence(tensors_sha256=tensors_digest(tensors)))
    assert evidence_text_for(path, tensors) == path.read_text()
    assert evidence_text_for(None, tensors) is None
    assert not caplog.text
    assert evidence_text_for(path, {"a": torch.ones(2)}) is None
    assert "other tensors" in caplog.text


@pytest.mark.parametrize(("kind", "heading"), [(Evidence, ""), (WeightEvidence, "weights."), (TextEvidence, "text.")])
def test_every_field_is_documented(kind, heading):
    section = PAGE.split("## `meswitch_evidence.json`")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE))
    fields = {f"{heading}{field.name}" for field in dataclasses.fields(kind)} - {"weights", "text"}
    mine = {name for name in documented if name.startswith(heading) and ("." in name) == bool(heading)}
    assert mine - {"weights", "text"} == fields


def test_mean_and_worst():
    weights = WeightEvidence({"a": 0.25, "b": 0.75}, {"2": 8})
    assert (weights.mean, weights.worst) == (0.5, ("b", 0.75))
    none = WeightEvidence({}, {})
    assert (none.mean, none.worst) == (None, None)
