"""Greedy answers to held-out prompts, in left-padded batches, and how many of them are right."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from tasks import Item, Task
from train import chat_prompt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: 97.5th percentile of the normal distribution.
_Z = 1.959964


def answer(
    model: PreTrainedModel,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    prompts: Sequence[str],
    max_new_tokens: int,
    **generate_options: Any,
) -> list[str]:
    """Greedy answers to one batch of prompts; row i is read and written with ``tokenizers[i]``.

    The end token is not passed: it is the one each checkpoint's (or expert's) generation config names.
    """
    rows = [
        tokenizer(chat_prompt(tokenizer, prompt), add_special_tokens=False).input_ids
        for tokenizer, prompt in zip(tokenizers, prompts, strict=True)
    ]
    width = max(map(len, rows))
    pad = tokenizers[0].pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, **generate_options
        )
    return [
        str(tokenizer.decode(row, skip_special_tokens=True)).strip()
        for tokenizer, row in zip(tokenizers, output[:, width:].tolist(), strict=True)
    ]


def answer_all(
    model: PreTrainedModel,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    experts: Sequence[str | None] | None = None,
) -> tuple[list[str], float]:
    """Answers to all prompts in batches of ``batch_size``, and the wall time in seconds.

    With ``experts``, row i is answered by ``experts[i]`` of a family; without, ``model`` is a plain causal LM.
    """
    answers: list[str] = []
    started = time.perf_counter()
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        options = {} if experts is None else {"expert": list(experts[rows])}
        answers += answer(model, tokenizers[rows], prompts[rows], max_new_tokens, **options)
    return answers, time.perf_counter() - started


def judge(task: Task, items: Sequence[Item], answers: Sequence[str]) -> list[bool]:
    """One flag an item: whether the task's exact scorer accepts its answer."""
    return [task.score(text, item.completion) for text, item in zip(answers, items, strict=True)]


def confidence_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion.

    >>> [round(bound, 3) for bound in confidence_interval(95, 100)]
    [0.888, 0.978]
    """
    z = _Z
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, float, float]:
    """Two models on the same items: lost, won, and the difference of their accuracies with half its 95 % interval.

    The interval is Wald's for paired proportions, from the items on which the two disagree:
    ``z / n * sqrt(lost + won - (won - lost)² / n)``.

    >>> paired_difference([True, True, False, False], [True, False, False, False])[:3]
    (1, 0, -0.25)
    """
    total = len(before)
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    won = sum(a and not b for b, a in zip(before, after, strict=True))
    half = _Z / total * math.sqrt(lost + won - (won - lost) ** 2 / total)
    return lost, won, (won - lost) / total, half
