"""What of a prompt is routed, as a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .conversation import is_chat, user_turns

__all__ = ["Prompt", "routed_text", "routed_turns"]

#: A text, or a conversation as the chat templates of transformers take it.
Prompt = str | Sequence[Mapping[str, Any]]


def routed_turns(prompt: Prompt) -> list[str]:
    """A text as it is; the user's messages of a conversation, oldest first.

    Raises:
        TypeError: neither a text nor a conversation.

    >>> routed_turns("Hi"), routed_turns([{"role": "user", "content": "1+1?"}])
    (['Hi'], ['1+1?'])
    """
    if isinstance(prompt, str):
        return [prompt]
    if is_chat(prompt):
        return user_turns(prompt)
    raise TypeError(
        f"A prompt is {type(prompt).__name__} {str(prompt)[:40]!r}; expected a text, or a list of messages such as "
        "{'role': 'user', 'content': 'Hello'}; of what a tokenizer returns give input_ids and attention_mask."
    )


def routed_text(prompt: Prompt) -> str:
    """The text that decides: the prompt, or the last user's message of a conversation; empty if there is none."""
    return next(reversed(routed_turns(prompt)), "")
