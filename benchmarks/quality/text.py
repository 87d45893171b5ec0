"""Items as token ids, in SmolLM2's chat markup without the system turn, which would be a fifth of every sequence."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .tasks import Item

__all__ = ["completion_text", "encode_items", "encode_prompts", "item_texts", "prompt_text"]


def prompt_text(item: Item) -> str:
    """The user's turn and the markup after which the answer starts."""
    return f"<|im_start|>user\n{item.prompt}<|im_end|>\n<|im_start|>assistant\n"


def completion_text(item: Item) -> str:
    """The answer to learn, with the token that ends it."""
    return f"{item.completion}<|im_end|>"


def item_texts(items: Sequence[Item]) -> list[str]:
    """Prompt, completion and end token of each item."""
    return [prompt_text(item) + completion_text(item) for item in items]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []


def encode_prompts(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[list[int]]:
    """Token ids of each prompt, up to where the answer starts."""
    return _encode(tokenizer, [prompt_text(item) for item in items])


def encode_items(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[tuple[list[int], int]]:
    """Token ids of prompt, completion and end token, and how many of them are the prompt's, of each item."""
    prompts = encode_prompts(tokenizer, items)
    completions = _encode(tokenizer, [completion_text(item) for item in items])
    return [([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, completions, strict=True)]
