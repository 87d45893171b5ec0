"""What "the same answer" means everywhere: token-equal, or first different where two tokens were all but equal."""

from __future__ import annotations

from typing import Any

import torch

#: Largest gap between the two best logits at which a greedy choice may fall the other way.
TIE = 1e-4


def same_answer(reference: Any, expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two greedy answers are the same in the sense above.

    Args:
        reference: the stock model that gave the expected answer.
        expected: int64 ``[length]``, prompt and answer.
        found: int64 ``[length]``; padding after the shorter of both is not looked at.
    """
    shared = min(len(expected), len(found))
    different = (expected[:shared] != found[:shared]).nonzero()
    if not len(different):
        return True
    with torch.no_grad():
        logits = reference(expected[None, : int(different[0])]).logits[0, -1]
    best, second = logits.topk(2).values
    return bool(best - second < TIE)
