"""Which text each step is trained on, and which is held out to judge by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from ..compression.batches import CalibrationBatches

__all__ = ["collate", "schedule", "sequences_of", "split"]

#: One sequence in so many is held out.
_HELD_OUT = 4
#: Positions that go through the model at once, padding included; a sequence is at least one batch.
_POSITIONS = 4096


def sequences_of(text: CalibrationBatches) -> list[Tensor]:
    """The sequences of a calibration set without padding, short ones first: int64 ``[length]`` each.

    >>> from ..compression.batches import Batch
    >>> batch = Batch(torch.tensor([[5, 5, 5], [5, 6, 7]]), torch.tensor([1, 3]))
    >>> [sequence.tolist() for sequence in sequences_of(CalibrationBatches((batch,), samples=2, tokens=4))]
    [[5], [5, 6, 7]]
    """
    return [
        ids[:length] for batch in text.batches for ids, length in zip(batch.ids, batch.lengths.tolist(), strict=True)
    ]


def split(count: int) -> tuple[list[int], list[int]]:
    """Numbers of the sequences to train on and of those held out, a quarter of each length; both from 2 on.

    >>> split(6)
    ([0, 2, 3, 4], [1, 5])
    """
    held_out = list(range(1, count, _HELD_OUT))
    return sorted(set(range(count)) - set(held_out)), held_out


def schedule(numbers: Sequence[int], steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """The sequences of each step: all of them in random order, then in another, and so on.

    >>> schedule([3, 4, 5], steps=3, batch_size=2, seed=0)
    [[4, 5], [3, 4], [5, 3]]
    """
    draw, order = Random(seed), list[int]()
    while len(order) < steps * batch_size:
        order += draw.sample(numbers, len(numbers))
    return [order[start : start + batch_size] for start in range(0, steps * batch_size, batch_size)]


def collate(sequences: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of sequences of like length, padded on the right with a token of their own.

    Args:
        sequences: all sequences.
        numbers: which of them.

    Yields:
        Their numbers, int64 ``[rows, length]`` and bool ``[rows, length]``, which positions are not padding.
    """
    rows: list[int] = []
    ordered = sorted(numbers, key=lambda number: (len(sequences[number]), number))
    for number, following in zip(ordered, [*ordered[1:], None], strict=True):
        rows.append(number)
        if following is None or (len(rows) + 1) * len(sequences[following]) > _POSITIONS:
            length = len(sequences[rows[-1]])
            ids = torch.stack([_padded(sequences[row], length) for row in rows])
            lengths = torch.tensor([len(sequences[row]) for row in rows])
            yield rows, ids, torch.arange(length) < lengths[:, None]
            rows = []


def _padded(sequence: Tensor, length: int) -> Tensor:
    return torch.cat([sequence, sequence[:1].expand(length - len(sequence))])
