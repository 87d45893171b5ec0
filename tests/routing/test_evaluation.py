"""Measures of a router against counting by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_meswitch import RouterOutput
from transformers_meswitch.errors import RouterError
from transformers_meswitch.routing.data import read_prompts
from transformers_meswitch.routing.evaluation import evaluate
from transformers_meswitch.routing.plotting import router_figure

LABELS = ["a", "b", "c"]


def output_of(rows: list[tuple[list[float], bool]]) -> RouterOutput:
    probabilities = torch.tensor([p for p, _ in rows])
    experts = [None if out else LABELS[int(p.argmax())] for p, (_, out) in zip(probabilities, rows, strict=True)]
    return RouterOutput(experts, probabilities, LABELS, torch.tensor([out for _, out in rows]))


ROWS = [([0.8, 0.1, 0.1], False), ([0.3, 0.6, 0.1], False), ([0.4, 0.35, 0.25], True), ([0.05, 0.95, 0.0], False)]


def test_measures() -> None:
    found = evaluate(output_of(ROWS), ["a", "a", "b", "b"])
    assert found.confusion.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert found.accuracy == 0.5
    assert found.coverage == 0.75
    assert found.routed_accuracy == pytest.approx(2 / 3)
    assert found.recall["a"] == 0.5
    assert math.isnan(found.recall["c"])
    assert found.precision == pytest.approx({"a": 1.0, "b": 0.5, "c": math.nan}, nan_ok=True)
    error = (abs(0.8 - 1) + abs(0.6 - 0) + abs(0.4 - 0) + abs(0.95 - 1)) / 4
    assert found.calibration_error == pytest.approx(error)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["precision"]["c"] is None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.floats(0.34, 1), st.booleans()), min_size=1))
def test_counts_add_up(cases: list[tuple[int, int, float, bool]]) -> None:
    rows = []
    for _, picked, p, out in cases:
        one = [(1 - p) / 2] * 3
        one[picked] = p
        rows.append((one, out))
    found = evaluate(output_of(rows), [LABELS[right] for right, *_ in cases])
    assert int(found.confusion.sum()) == sum(one.prompts for one in found.calibration) == len(cases)
    assert found.accuracy == pytest.approx(sum(right == picked for right, picked, *_ in cases) / len(cases))
    assert 0 <= found.calibration_error <= 1


def test_what_cannot_be_measured() -> None:
    with pytest.raises(RouterError, match="prompts of 'x'; the router chooses among 'a', 'b', 'c'"):
        evaluate(output_of(ROWS), ["a", "a", "b", "x"])
    with pytest.raises(RouterError, match="no prompts"):
        evaluate(RouterOutput([], torch.zeros(0, 3), LABELS, torch.zeros(0, dtype=torch.bool)), [])


def test_figure_shows_the_counts() -> None:
    figure = router_figure(evaluate(output_of(ROWS), ["a", "a", "b", "b"]))
    matrix, curve = figure.axes
    assert [text.get_text() for text in matrix.texts] == ["1", "1", "0", "0", "0", "1", "0", "1", "0", "0", "0", "0"]
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["a", "b", "c", "abstained"]
    drawn = curve.lines[1].get_xydata().flatten().tolist()
    assert drawn == pytest.approx([0.4, 0.0, 0.6, 0.0, 0.8, 1.0, 0.95, 1.0])


# -- data ------------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_files_of_all_kinds(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    rows = [
        {"expert": "a", "prompt": "1"},
        {"expert": "b", "text": "2"},
        {"expert": "a", "messages": chat},
        {"expert": "a", "prompt": "1", "text": None},
        {"expert": "b", "prompt": None, "text": "2"},
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("zwei\n\ndrei\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"prompt": "x = y"}', encoding="utf-8")
    found = read_prompts([f"{tmp_path}/all.jsonl", f"b={tmp_path}/b.txt", f"c={tmp_path}/c.jsonl"])
    assert found == {"a": ["1", chat], "b": ["2", "zwei", "drei"], "c": ["x = y"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt": "a"}', r"Line 1 of .*x.jsonl names no expert: its 'expert' is None"),
        ("x.jsonl", '\n{"expert": "a"}', r"Line 2 of .*x.jsonl is .* expected an object with 'prompt'"),
        ("x.jsonl", "[1]", "Line 1 of .* is '\\[1\\]', expected an object"),
        ("x.jsonl", "{", "Line 1 of .*x.jsonl is not JSON"),
        ("x.txt", "a", "does not say whose prompts"),
        ("x.csv", "a", "neither a .txt nor a .jsonl file"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RouterError, match=message):
        read_prompts([str(tmp_path / name)])


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="cannot be read"):
        read_prompts([f"a={tmp_path}/none.txt"])
    with pytest.raises(RouterError, match="'nobody/nothing' "):
        read_prompts(["a=nobody/nothing"])


def test_lines_end_with_line_feeds_and_paths_may_have_equals_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.jsonl").write_text(
        '{"expert": "a", "prompt": "one\u2028two"}\r\n{"expert": "a", "prompt": "three\x85"}\n', encoding="utf-8"
    )
    assert read_prompts(["lr=1.jsonl"]) == {"a": ["one\u2028two", "three\x85"]}
    assert read_prompts(["b=lr=1.jsonl"]) == {"b": ["one\u2028two", "three\x85"]}
