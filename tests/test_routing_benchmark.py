"""``benchmarks/routing``: what is measured on stays what was frozen, and the measuring is right."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import torch

from benchmarks.routing import freeze, sources
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
    def names(table: dict[str, list[sources.Source]]) -> set[str]:
        return {repr(getattr(read, "args", read)) for own in table.values() for read, _ in own}

    assert not names(sources._TRAIN) & names(sources._TEST)


def test_what_is_taken_depends_on_the_texts_alone() -> None:
    texts = [f"prompt {i}" for i in range(50)]

    def backwards() -> Iterable[str]:
        return reversed(texts)

    taken = sources._taken([(lambda: texts, 10)])
    assert taken == sources._taken([(backwards, 10)])
    assert len(sources._taken([(lambda: texts, 10), (backwards, 10)])) == 20
    assert taken != texts[:10]


def test_missing_packages_are_named() -> None:
    with pytest.raises(SystemExit, match="pip install"):
        sources._folder("no_such_package")


def test_the_peer_learns_what_can_be_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    points = {label: torch.randn(40, 4, generator=generator) + 4 * i for i, label in enumerate("ab")}
    peer = EncoderPeer.__new__(EncoderPeer)
    output = peer.ask(peer.fit(points), torch.cat(list(points.values())))
    assert output.experts == ["a"] * 40 + ["b"] * 40
    mixed = {label: torch.randn(40, 4, generator=generator) for label in "ab"}
    assert peer.ask(peer.fit(mixed), torch.cat(list(mixed.values()))).probabilities.max() < 0.99
