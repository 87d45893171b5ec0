"""What of a conversation is routed: what the user says, not the system prompt and not the answers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["is_chat", "template_marks", "turns_in_ids", "turns_in_text", "user_turns"]

_QUESTION, _ANSWER, _FOLLOW_UP = "sesquipedalian", "perspicacious", "lugubrious"


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a conversation: a list of messages.

    >>> is_chat([{"role": "user", "content": "Hi"}]), is_chat("Hi"), is_chat([])
    (True, False, False)
    """
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(turn, Mapping) for turn in prompt)


def user_turns(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of the user's messages, oldest first; of a message of several parts, those that are text.

    >>> user_turns([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}])
    ['1+1?']
    """
    return [_text(turn.get("content")) for turn in messages if turn.get("role") == "user"]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else ()
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, Mapping) and part.get("text"))


def template_marks(tokenizer: Any) -> tuple[str, str] | None:
    """What a chat template puts before and after a user's message, as the tokenizer decodes it.

    Returns:
        The two; `None` if there is no template, or if nothing in it sets the user's messages apart.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _FOLLOW_UP},
    ]
    try:
        text, closed = (
            _decoded(tokenizer, tokenizer.apply_chat_template(chat, add_generation_prompt=asked, return_dict=False))
            for asked in (True, False)
        )
    except Exception:  # a template is a program, which may not take such a chat
        return None
    before, found_question, rest = text.partition(_QUESTION)
    between, found_answer, rest = rest.partition(_ANSWER)
    again, found_follow_up, after = rest.partition(_FOLLOW_UP)
    opening = _common_prefix(before[::-1], again[::-1])[::-1]
    for text in (before, again):
        opening = _without_half_token(opening, text, tokenizer.all_special_tokens)
    if not (found_question and found_answer and found_follow_up and opening.strip()):
        return None
    # Messages have line breaks too: a template that puts nothing else behind them is told by what opens the answer.
    answer = _common_prefix(between, after)
    candidates = (_common_prefix(between, closed.partition(_FOLLOW_UP)[2]), answer, between.rstrip())
    return opening, next((closing for closing in candidates if closing.strip()), "")


def turns_in_text(text: str, marks: tuple[str, str]) -> list[str]:
    """The user's messages in a conversation that a chat template wrote, oldest first; none without its marks.

    >>> turns_in_text("<s>Be brief.</s><u>Hi</u><a>Hello</a><u>Bye</u>", ("<u>", "</u>"))
    ['Hi', 'Bye']
    """
    opening, closing = marks
    turns = text.split(opening)[1:]
    return [turn.partition(closing)[0] if closing else turn for turn in turns]


def turns_in_ids(tokenizer: Any, ids: Sequence[int], marks: tuple[str, str]) -> list[str]:
    """The user's messages in the token ids of a conversation, as :func:`turns_in_text`."""
    return turns_in_text(_decoded(tokenizer, ids), marks)


def _common_prefix(one: str, other: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


def _without_half_token(opening: str, text: str, special: Sequence[str]) -> str:
    """What ``text`` ends with, less the end of a special token that began before it."""
    start = len(text) - len(opening)
    for token in special:
        for inside in range(1, len(token)):
            if text[: start + inside].endswith(token):
                return opening[inside:]
    return opening


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
