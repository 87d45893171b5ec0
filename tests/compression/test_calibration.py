"""Every way to give calibration text, the built-in set among them."""

import builtins
import json
import sys
import types

import pytest

from transformers_meswitch.compression.calibration import read_samples
from transformers_meswitch.compression.default_calibration import default_chats
from transformers_meswitch.errors import CompressionError


def test_text_file(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("One line.\n\nÄnother.\n", encoding="utf-8")
    assert list(read_samples(path, tokenizer)) == ["One line.", "Änother."]
    assert list(read_samples(str(path), tokenizer)) == ["One line.", "Änother."]


def test_jsonl_file(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    ask, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    rows = [
        {"text": "plain"},
        {"messages": [ask, answer]},
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": [ask], "completion": [answer]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    chat = "[user]hi[assistant]ho"
    assert list(read_samples(path, tokenizer)) == ["plain", chat, "1+1=2", chat]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{broken', "Line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", '{"question": "a"}', "Line 1 of .*a.jsonl is .*expected an object"),
        ("a.jsonl", '["a"]', "Line 1 of .*a.jsonl is .*expected an object"),
        ("a.jsonl", '{"messages": []}', "has no chat template"),
        ("a.csv", "a", "neither a .txt nor a .jsonl file"),
    ],
)
def test_bad_files_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CompressionError, match=message):
        list(read_samples(tmp_path / name, tokenizer))


def test_missing_file_and_bad_list_are_refused(tmp_path, tokenizer):
    with pytest.raises(CompressionError, match="cannot be read"):
        list(read_samples(tmp_path / "none.txt", tokenizer))
    with pytest.raises(CompressionError, match=r"calibration\[1\] is int"):
        list(read_samples(["a", 3], tokenizer))


def test_the_built_in_set_is_rendered_by_the_template_where_there_is_one(tokenizer):
    plain = list(read_samples("default", tokenizer))
    assert len(plain) == 360
    assert plain[0] == "\n\n".join(turn["content"] for turn in next(default_chats()))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    chats = list(read_samples("default", tokenizer))
    assert all(chat.startswith("[user]") and "[assistant]" in chat for chat in chats)


def test_the_built_in_set_is_varied_and_well_formed():
    chats = list(default_chats())
    assert len({json.dumps(chat) for chat in chats}) > 300
    for chat in chats:
        assert [turn["role"] for turn in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert all(turn["content"].strip() for turn in chat)
    text = " ".join(turn["content"] for chat in chats for turn in chat)
    assert 80_000 < len(text) < 200_000, "a few tens of thousands of tokens"
    for character in "äéдはت图क비":
        assert character in text
    assert "{noun}" not in text


def test_the_answers_of_the_built_in_set_are_right():
    for chat in default_chats():
        question, answer = chat[0]["content"], chat[1]["content"]
        if question.startswith("Solve for x"):
            left, right = question.removeprefix("Solve for x: ").split(" = ")
            factor, term = (int(part) for part in left.split("x + "))
            solution = int(answer.split(": x = ")[1].split(".")[0])
            assert factor * solution + term == int(right)
        elif "boxes with" in question:
            boxes, each, given = (int(word) for word in question.split() if word.isdigit())
            assert answer.endswith(f"#### {boxes * each - given}")
        elif question.startswith("Extract"):
            assert json.loads(answer)["customer"] in question


def test_data_set(tokenizer, monkeypatch):
    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("user/data", "train", True)
        return [{"text": "row"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_samples("user/data", tokenizer)) == ["row"]


def test_data_set_without_the_package(tokenizer, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CompressionError, match="pip install datasets"):
        list(read_samples("user/data", tokenizer))
