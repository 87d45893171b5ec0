"""``benchmarks/routing``: what is measured on stays what was frozen, and the measuring is right."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.load.random_family import SHAPES
from benchmarks.routing import __main__ as benchmark
from benchmarks.routing import cost, dev, filling, freeze, more_sources, own, own_law, own_sql, sources, training
from benchmarks.routing.encoder import EncoderPeer


def test_the_hard_set_is_the_frozen_one() -> None:
    frozen = json.loads(freeze.FROZEN.read_text())
    rows = sources.hard_set()
    assert frozen["hard.jsonl"]["prompts"] == len(rows) == 50
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    assert frozen["hard.jsonl"]["sha256"] == sources.digest(lines)
    assert all(set(row["experts"]) <= set(sources.EIGHT) and row["prompt"] for row in rows)
    lines[0] += " "
    assert frozen["hard.jsonl"]["sha256"] != sources.digest(lines)


def test_every_domain_has_three_hundred_test_prompts() -> None:
    frozen = json.loads(freeze.FROZEN.read_text())
    assert set(frozen) == {*sources.EIGHT, "hard.jsonl"}
    assert all(frozen[domain]["prompts"] >= 300 for domain in sources.EIGHT)


def test_other_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = json.loads(freeze.FROZEN.read_text())
    monkeypatch.setattr(freeze, "current", lambda: frozen)
    freeze.check_frozen()
    monkeypatch.setattr(freeze, "current", lambda: {**frozen, "code": {"prompts": 328, "sha256": "0"}})
    with pytest.raises(SystemExit, match="code are not those that were frozen"):
        freeze.check_frozen()


def test_no_source_is_both_trained_and_tested_on() -> None:
    def names(table: Iterable[sources.Source]) -> set[str]:
        return {str(getattr(read, "args", (read,))[0]) for read, _ in table}

    trained = [source for own_sources in training.TRAINING.values() for _, source in own_sources]
    tested = [source for own_sources in sources._TEST.values() for source in own_sources]
    assert not names(trained) & names(tested)


def test_what_is_taken_depends_on_the_texts_alone() -> None:
    texts = [f"prompt {i}" for i in range(50)]

    def backwards() -> Iterable[str]:
        return reversed(texts)

    taken = sources.taken([(lambda: texts, 10)])
    assert taken == sources.taken([(backwards, 10)])
    assert len(sources.taken([(lambda: texts, 10), (backwards, 10)])) == 20
    assert taken != texts[:10]


def test_missing_packages_are_named() -> None:
    with pytest.raises(SystemExit, match="pip install"):
        sources.folder("no_such_package")


def test_the_peer_learns_what_can_be_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    points = {label: torch.randn(40, 4, generator=generator) + 4 * i for i, label in enumerate("ab")}
    peer = EncoderPeer.__new__(EncoderPeer)
    output = peer.ask(peer.fit(points), torch.cat(list(points.values())))
    assert output.experts == ["a"] * 40 + ["b"] * 40
    mixed = {label: torch.randn(40, 4, generator=generator) for label in "ab"}
    assert peer.ask(peer.fit(mixed), torch.cat(list(mixed.values()))).probabilities.max() < 0.99


def test_every_domain_has_sources_in_every_group() -> None:
    assert set(training.TRAINING) == set(sources.EIGHT)
    for table in training.TRAINING.values():
        assert {group for group, _ in table} == set(range(training.GROUPS))


OWN: list[Callable[[], Iterable[str]]] = [
    own.medical,
    own.german,
    own.code,
    own.instruction,
    own.mathematics,
    own_law.legal,
    own_law.legal_cases,
    own_sql.schema_requests,
    own_sql.short_requests,
    own_sql.table_requests,
]


@pytest.mark.parametrize("make", OWN, ids=lambda make: make.__name__)
def test_own_requests_are_many_complete_and_the_same_every_time(make: Callable[[], Iterable[str]]) -> None:
    found = list(make())
    assert found == list(make())
    assert len(set(found)) >= 150
    left_open = re.compile(r"(?<![\[{$])\{[a-z]+\}")
    assert not [text for text in found if left_open.search(text)]
    assert not {row["prompt"] for row in sources.hard_set()} & set(found)


def test_frames_leave_the_prompt_in() -> None:
    prompts = [f"prompt {i}" for i in range(200)]
    found = filling.framed(prompts, 0.3)
    assert all(prompt in text for prompt, text in zip(prompts, found, strict=True))
    assert 30 < sum(prompt != text for prompt, text in zip(prompts, found, strict=True)) < 90
    assert filling.framed(prompts, 0.0) == prompts


def test_a_request_stands_before_and_after() -> None:
    assert list(more_sources.with_request("Do.", lambda: ["a", "b"])) == ["a\n\nDo.", "Do.\n\nb"]


def test_dev_judges_what_it_was_not_trained_on() -> None:
    """A source that is like the other domain's is wrong where it is kept out, and was not seen."""
    generator = torch.Generator().manual_seed(0)

    def points(where: float) -> torch.Tensor:
        return torch.randn(12, 6, generator=generator) * 0.1 + where

    table = {"a": [points(0.0) for _ in range(4)], "b": [points(5.0) for _ in range(4)]}
    table["b"][3] = points(0.0)
    found = dev.kept_out({label: [(i, x, x) for i, x in enumerate(own)] for label, own in table.items()}, rank=6)
    assert found == {"a": 1.0, "b": 0.75}


SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
)


def test_the_cost_is_measured_without_a_trained_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    found = cost.cost(cost.shaped("small", "cpu"), tokens=300)
    assert found["layer"] == 2
    assert found["layers_of_the_base"] == 8
    assert found["window"] == 256
    assert found["prefill_seconds"] > 0
    assert set(found["route_seconds_by_experts"]) == {"4", "64"}
    assert found["share_of_prefill"] == found["route_seconds_by_experts"]["4"] / found["prefill_seconds"]


def test_a_part_alone_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "shaped", lambda shape, device: shape)
    row = {"share_of_prefill": 0.1, "share_of_prefill_many": 0.2, "prompt_tokens": 300, "layer": 2, "window": 256}
    monkeypatch.setattr(benchmark, "cost", lambda model: row)
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({"kept": 1, "cost": {"base_cpu": {**row, "share_of_prefill": 0.3}}}))
    command = ["routing", "--shape", "mistral-7b", "--parts", "cost", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    found = json.loads(path.read_text())
    assert found["kept"] == 1
    assert found["cost"]["base_cpu"]["share_of_prefill"] == 0.3
    placed = found["cost"]["mistral-7b_cpu"]
    assert placed["share_of_prefill"] == 0.1
    assert "--parts cost" in placed["command"]
    assert "date" in placed


def test_what_is_captured_stands_beside_what_is_not() -> None:
    row = {
        "prompt_tokens": 2048,
        "layer": 8,
        "window": 256,
        "prefill_seconds": 0.1,
        "share_of_prefill": 0.2,
        "share_of_prefill_many": 0.21,
    }
    assert len(benchmark._table({"cost": {"here": row}}).splitlines()) == 2
    captured = {
        "captured_seconds_by_experts": {"4": 0.004, "64": 0.005},
        "captured_share_of_prefill": 0.04,
        "captured_share_of_prefill_many": 0.05,
        "route_device_seconds": 0.002,
        "captured_device_seconds": 0.003,
    }
    line = benchmark._table({"cost": {"here": {**row, **captured}}}).splitlines()[-1]
    assert line == "  captured: 4.0% (5.0%); the device is busy for 2.0%, captured for 3.0%"


@pytest.mark.gpu
def test_the_cost_of_captured_layers_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    found = cost.cost(cost.shaped("small", "cuda"), tokens=300)
    assert set(found["captured_seconds_by_experts"]) == {"4", "64"}
    assert 0 < found["captured_device_seconds"] < found["captured_seconds_by_experts"]["4"]
    assert 0 < found["route_device_seconds"] < found["route_seconds_by_experts"]["4"]
    assert found["captured_share_of_prefill"] == found["captured_seconds_by_experts"]["4"] / found["prefill_seconds"]


@pytest.mark.parametrize("arguments", [[], ["--base", "b"], ["--base", "b", "--parts", "encoder"]])
def test_what_a_part_needs_is_asked_for(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["routing", *arguments])
    with pytest.raises(SystemExit):
        benchmark.main()
