"""Prompts from what experts were calibrated on: what is found again, and what is refused."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from transformers_meswitch.compression.calibration_record import calibration_record
from transformers_meswitch.compression.default_calibration import default_chats
from transformers_meswitch.errors import RouterError
from transformers_meswitch.routing.calibration_sets import calibration_sets


def test_what_is_recorded_tells_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for path in (tmp_path / "here" / "data" / "math.txt", tmp_path / "elsewhere.jsonl"):
        path.write_text(path.name)
    digest = hashlib.sha256(b"math.txt").hexdigest()
    expected = {"source": "data/math.txt", "samples": 3, "sha256": digest}
    for given in ("data/math.txt", tmp_path / "here" / "data" / "math.txt", "../here/data/math.txt"):
        assert calibration_record(given, 3) == expected
    for outside in ("../elsewhere.jsonl", tmp_path / "elsewhere.jsonl"):
        found = calibration_record(outside, 3)
        assert found is not None
        assert found["source"] == "elsewhere.jsonl"
    assert calibration_record("default", 9) == {"source": "default", "samples": 9}
    assert calibration_record("me/data", 9) == {"source": "me/data", "samples": 9}
    assert calibration_record(None, 0) is calibration_record(["text"], 1) is calibration_record("gone.txt", 1) is None


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of experts with a set each, in the working folder."""
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"prompt": "1+1=", "completion": "2"}, {"messages": chat}, {"prompt": "1+1=", "completion": "2"}]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "never read"}])))
    (tmp_path / "code.txt").write_text("def f():\nimport os\n")
    found = {"math": calibration_record("math.jsonl", 3), "code": calibration_record("code.txt", 2)}
    return {**found, "chat": calibration_record("default", 50)}


def test_sets_are_read_as_far_as_they_were_used_and_without_the_answers(records: dict[str, Any]) -> None:
    found = calibration_sets(records, Path())
    assert found["math"].prompts() == [
        "1+1=",
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    ]
    assert found["code"].prompts() == ["def f():", "import os"]
    assert found["chat"].prompts() == list(default_chats())[:50]
    assert list(map(str, found.values())) == ["math.jsonl", "code.txt", "the built-in set"]


def test_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **_: Any) -> Any:
        return ({"text": f"{name} {i}"} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = calibration_sets({"math": {"source": "me/math", "samples": 2}}, Path())
    assert found["math"].prompts() == ["me/math 0", "me/math 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"math": None}, r"'math': its delta does not say .*\n.*'code': fine \(code.txt\)"),
        ({"math": {"source": "default", "samples": 9}}, r"'math': calibrated on the built-in set, as 'chat'"),
        ({"math": {"source": "none.txt", "samples": 9}}, "'math': calibrated on none.txt, which is not in "),
        ({"math": {"source": "code.txt", "samples": 9, "sha256": "0"}}, "'math': .*is another file, or was changed"),
        ({"math": {"source": "code.txt", "samples": 9}}, "'math': .*is another file, or was changed"),
        (
            {"math": {"source": "../code.txt", "samples": 9}},
            r"'math': its delta names '../code.txt', which is neither",
        ),
        ({"math": {"source": "/etc/motd.txt", "samples": 9}}, "'math': its delta names '/etc/motd.txt', which is"),
    ],
)
def test_each_expert_is_named_with_what_is_known(records: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(RouterError, match=message) as refused:
        calibration_sets({**records, **changes}, Path())
    assert "--data math=WHERE --data code=code.txt --data chat=WHERE" in str(refused.value)


def test_the_same_file_under_two_names_tells_nothing_apart(records: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_bytes((tmp_path / "code.txt").read_bytes())
    with pytest.raises(RouterError, match=r"'code': calibrated on code.txt, as 'copy', which does not tell them"):
        calibration_sets({**records, "copy": calibration_record("copy.txt", 2)}, Path())
    with pytest.raises(RouterError, match="no experts"):
        calibration_sets({}, Path())
