"""The one reader of rows of text, which calibration and routers share."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from transformers_meswitch.compression.calibration import read_samples
from transformers_meswitch.errors import CompressionError, MESwitchError, RouterError
from transformers_meswitch.routing.data import read_prompts
from transformers_meswitch.text_rows import check_rows, read_rows

#: Where ``str.splitlines`` cuts and JSON does not.
INSIDE = "one\u2028two\u2029three\x85four\x7ffive"


def texts(path: Path) -> list[Any]:
    return [row for row, _ in read_rows(path, RouterError)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_lines_end_at_line_feeds_alone(tmp_path: Path, end: str, encoding: str) -> None:
    rows = [{"text": INSIDE}, {"text": "last"}]
    content = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode(encoding))
    assert len(content.splitlines()) > 2
    assert texts(path) == rows
    assert list(read_samples(path, None)) == [INSIDE, "last"]  # type: ignore[arg-type]  # no template is needed
    assert read_prompts([f"a={path}"]) == {"a": [INSIDE, "last"]}


def test_lines_of_text_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(f"  {INSIDE} \n\n \t\nlast", encoding="utf-8")
    assert [(row["text"], place) for row, place in read_rows(path, RouterError)] == [
        (f"  {INSIDE} ", f"Line 1 of {path}"),
        ("last", f"Line 4 of {path}"),
    ]


@pytest.mark.parametrize("error", [CompressionError, RouterError])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": 1}\n{', "Line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b"[" * 100_000, "Line 1 of .*a.jsonl is not JSON"),
        ("a.txt", b"one\n\xff", "a.txt cannot be read: 'utf-8' codec"),
        ("a.csv", b"one", "a.csv is neither a .txt nor a .jsonl file. Give one of these, or the id"),
        ("none.txt", None, "none.txt cannot be read"),
        ("folder.jsonl", "", "folder.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, error: type[MESwitchError], name: str, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
    with pytest.raises(error, match=message):
        list(read_rows(path, error))


def test_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert (split, streaming) == ("train", True)
        if name != "me/data":
            raise FileNotFoundError("no such data set.")
        return iter([{"text": "row"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    check_rows("me/data", RouterError)
    assert list(read_rows("me/data", RouterError)) == [({"text": "row"}, "A row of me/data")]
    with pytest.raises(RouterError, match=r"'me/other' cannot be loaded: no such data set. Give the id"):
        list(read_rows("me/other", RouterError))
