"""What is read of a prompt: its window, and of conversations the user's messages."""

from __future__ import annotations

import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.fixtures_models import character_tokenizer
from transformers_meswitch.demo.runner import FAMILY
from transformers_meswitch.routing.conversation import template_marks, turns_in_ids, turns_in_text, user_turns
from transformers_meswitch.routing.texts import routed_text, routed_turns
from transformers_meswitch.routing.window import control_ids, token_window, window_ids

CHAT = [
    {"role": "system", "content": "Answer like json."},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "last"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "inst": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    "default-system": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe nice<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "vicuna": "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token + '\n' }}{% else %}"
    "{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}{% else %}"
    "{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "never-asks": "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + '\n' }}{% endif %}{% endfor %}",
    "demo": None,
}


def tokenizer(name: str) -> Any:
    found = AutoTokenizer.from_pretrained(FAMILY)
    found.add_tokens(["\n"])
    if TEMPLATES[name] is not None:
        found.chat_template = TEMPLATES[name]
    return found


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_user_turns_are_found_in_token_ids(name: str, asked: bool) -> None:
    own = tokenizer(name)
    marks = template_marks(own)
    assert marks is not None
    ids = own.apply_chat_template(CHAT, add_generation_prompt=asked, return_dict=False)
    assert [turn.strip() for turn in turns_in_ids(own, ids, marks)] == ["first", "last"]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "demo"])
def test_messages_of_several_lines_are_not_cut(name: str, asked: bool) -> None:
    own = tokenizer(name)
    marks = template_marks(own)
    assert marks is not None
    turns = ["one\ntwo\n\nthree", "four\n\nfive"]
    chat = [{**turn} for turn in CHAT]
    chat[1]["content"], chat[3]["content"] = turns
    ids = own.apply_chat_template(chat, add_generation_prompt=asked, return_dict=False)
    assert [turn.strip() for turn in turns_in_ids(own, ids, marks)] == turns


def test_without_marks_there_is_no_conversation() -> None:
    own = tokenizer("demo")
    own.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert template_marks(own) is None
    own.chat_template = "{{ raise_exception('no system prompt') }}"
    assert template_marks(own) is None
    own.chat_template = None
    assert template_marks(own) is None
    assert turns_in_text("no marks", ("<u>", "</u>")) == []


def test_last_user_turn_without_the_system_prompt() -> None:
    assert routed_turns(CHAT) == ["first", "last"]
    assert routed_text(CHAT) == "last"
    assert routed_text(CHAT[:1]) == ""
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]
    assert user_turns([{"role": "user", "content": parts}, {"role": "user", "content": None}]) == [
        "What is\nthis?",
        "",
    ]


@pytest.mark.parametrize("prompt", [3, None, [], ["a"], b"text"])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(TypeError, match="expected a text, or a list of messages"):
        routed_turns(prompt)


CHARACTERS = character_tokenizer()

# -- windows ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(2, 12))
def test_token_window_is_both_ends(ids: list[int], window: int) -> None:
    found = token_window(ids, window)
    assert len(found) == min(len(ids), window)
    half = window // 2
    assert found == (ids if len(ids) <= window else ids[: window - half] + ids[-half:])


@given(st.lists(st.text(max_size=300), max_size=3), st.integers(2, 9))
def test_window_of_texts_is_that_of_their_tokens(texts: list[str], window: int) -> None:
    """The short cut for long texts changes nothing; here, a character is a token."""
    own = CHARACTERS
    whole = [own(text.strip(), add_special_tokens=False)["input_ids"] for text in texts]
    assert window_ids(own, texts, window) == [token_window(ids, window) for ids in whole]


def test_long_texts_are_not_tokenised_whole() -> None:
    read = 0

    def count(texts: list[str], **_: Any) -> dict[str, Any]:
        nonlocal read
        read += sum(map(len, texts))
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    text = "start" + "x" * 10**6 + "end"
    found = window_ids(count, [text], 8)
    assert "".join(map(chr, found[0])) == "starxend"
    assert read == 2 * 8 * 16


class Words:
    """A tokenizer of words, of which some structure a prompt and one stands for all that it does not know."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 1, 2, 2, 0
    all_special_ids = (0, 1, 2)
    added_tokens_decoder = {3: types.SimpleNamespace(special=True), 4: types.SimpleNamespace(special=False)}  # noqa: RUF012

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def test_control_tokens_are_left_out_and_unknown_words_are_not() -> None:
    tokenizer = Words()
    assert control_ids(tokenizer) == {1, 2, 3}
    assert window_ids(tokenizer, ["1 0 5 2 3 4 6", "1 2"], 8) == [[0, 5, 4, 6], []]
    tokenizer.unk_token_id = 2  # as of models whose one special token is all of these
    assert control_ids(tokenizer) == {0, 1, 2, 3}


def test_texts_that_are_no_unicode() -> None:
    assert window_ids(character_tokenizer(), ["a\ud800b", "  \n\t", ""], 8)[0]
    assert window_ids(character_tokenizer(), [" \n\t", ""], 8) == [[], []]
    assert window_ids(character_tokenizer(), [], 8) == []
