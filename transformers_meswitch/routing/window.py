"""The part of a prompt that a router reads: beginning and end, so that long prompts cost no more than short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["control_ids", "token_window", "window_ids"]

#: Characters that stand for one token at most in what is tokenised; runs of spaces and such are longer, and are cut.
_CHARACTERS_A_TOKEN = 16


def token_window(ids: Sequence[int], window: int) -> list[int]:
    """The first and the last ids, half of the window each; all of them where they fit.

    What a prompt asks for stands at its beginning or at its end, around whatever was pasted into it.

    Args:
        ids: token ids.
        window: how many to keep at most.

    >>> token_window(range(10), 4), token_window([1, 2], 4)
    ([0, 1, 8, 9], [1, 2])
    """
    ids = list(ids)
    return ids if len(ids) <= window else ids[: window - window // 2] + ids[len(ids) - window // 2 :]


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that structure a prompt, such as ends of turns; a user who types one out asks nothing by it.

    Told by the ids, as a tokenizer that is asked to read them as text changes for all threads that use it.

    Args:
        tokenizer: the base's.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*getattr(tokenizer, "all_special_ids", ()), *(i for i, token in added.items() if token.special)}
    ends = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    unknown = getattr(tokenizer, "unk_token_id", None)  # stands for text, unless it has another part to play
    return frozenset(special - ({unknown} - set(ends)))


def window_ids(tokenizer: Any, texts: Sequence[str], window: int) -> list[list[int]]:
    """Token ids of the window of each text; none for a text of nothing but white space and control tokens.

    Control tokens in a text are left out: they would end a turn, or open one, in the middle of what is read. Of a
    long text only the beginning and the end are tokenised, so that the work is bounded.

    Args:
        tokenizer: the base's.
        texts: prompts; characters that are no Unicode text (lone surrogates) are read as ``?``.
        window: tokens to keep at most.
    """
    reach = window * _CHARACTERS_A_TOKEN
    clean = [text.strip().encode("utf-8", "replace").decode("utf-8") for text in texts]
    parts = [part for text in clean for part in ((text[:reach], text[-reach:]) if len(text) > 2 * reach else (text,))]
    control = control_ids(tokenizer)
    tokenised = tokenizer(parts, add_special_tokens=False)["input_ids"] if parts else ()
    encoded = iter([token for token in ids if token not in control] for ids in tokenised)
    rows = []
    for text in clean:
        ids = next(encoded)
        if len(text) > 2 * reach:
            first, last = window - window // 2, window // 2
            tail = next(encoded)
            ids = ids[:first] + tail[len(tail) - min(last, len(tail)) :]
        rows.append(token_window(ids, window))
    return rows
