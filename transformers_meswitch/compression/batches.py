"""Calibration text as batches of token ids: samples of like length, padded on the right to equal length."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CompressionError

__all__ = ["Batch", "CalibrationBatches", "hold_out", "pack", "sequences_of", "spread", "tokenize"]

#: Fewer tokens than this say nothing about thousands of channels; it is a guard against a wrong file, not advice.
_MIN_TOKENS = 32
#: Longer samples are cut into pieces of this length, which bounds the memory of a forward pass.
_MAX_LENGTH = 2048
#: Tokens that go through a layer at once, padding included.
_BATCH_TOKENS = 4096
#: The shortest sequence; longer ones have this length doubled until the sample fits, so at most half is padding.
_SHORTEST = 32


@dataclass(frozen=True)
class Batch:
    """Sequences of equal length.

    A causal model's real positions do not see what is padded behind them, so no attention mask is needed.

    Attributes:
        ids: int64 ``[rows, length]`` on the CPU, padded on the right.
        lengths: int64 ``[rows]``, how many tokens of each row are real.
    """

    ids: Tensor
    lengths: Tensor

    @property
    def real(self) -> Tensor:
        """Bool ``[rows, length]``: which positions hold a token of the sample.

        >>> Batch(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 3])).real.tolist()
        [[True, False, False], [True, True, True]]
        """
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]


@dataclass(frozen=True)
class CalibrationBatches:
    """A calibration set, ready to run.

    Attributes:
        batches: the token ids; batches of equal shape follow each other.
        samples: how many samples were read, the last perhaps not to its end.
        tokens: how many tokens they have, padding left out.
    """

    batches: tuple[Batch, ...]
    samples: int
    tokens: int

    def digest(self) -> str:
        """64 hexadecimal digits that stand for the token ids and how they are batched."""
        digest = hashlib.sha256()
        for batch in self.batches:
            digest.update(f"{tuple(batch.ids.shape)}|{batch.lengths.tolist()}|".encode())
            digest.update(batch.ids.numpy().tobytes())
        return digest.hexdigest()


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[str],
    *,
    max_tokens: int,
    vocab_size: int,
    max_positions: int | None = None,
) -> CalibrationBatches:
    """Tokenise a calibration set and batch it.

    Args:
        tokenizer: the expert's.
        samples: texts; read only as far as ``max_tokens`` asks.
        max_tokens: how many tokens to take at most.
        vocab_size: rows of the expert's input embedding.
        max_positions: the longest sequence that the expert takes; `None` if it does not say.

    Raises:
        CompressionError: fewer than 32 tokens of text, or a token id that the embedding has no row for.
    """
    length = min(_MAX_LENGTH, max_positions or _MAX_LENGTH)
    sequences: list[list[int]] = []
    read = tokens = 0
    for sample in samples:
        read += 1
        ids = _ids(tokenizer, sample)[: max_tokens - tokens]
        outside = next((i for i in ids if not 0 <= i < vocab_size), None)
        if outside is not None:
            raise CompressionError(
                f"The expert's tokenizer gives the token id {outside}, but its embedding has {vocab_size} rows. "
                "The tokenizer in the expert's repo is of another model; put the expert's own there."
            )
        tokens += len(ids)
        sequences += [ids[start : start + length] for start in range(0, len(ids), length)]
        if tokens >= max_tokens:
            break
    if tokens < _MIN_TOKENS:
        raise CompressionError(
            f"The calibration text has {tokens} tokens, expected at least {_MIN_TOKENS}. Give a few hundred samples "
            'of what the expert is asked, or calibration="default" for the built-in set.'
        )
    return CalibrationBatches(tuple(pack(sequences, max_length=length)), read, tokens)


def _ids(tokenizer: PreTrainedTokenizerBase, sample: str) -> list[int]:
    ids = list(tokenizer(sample, verbose=False)["input_ids"])
    # Chat templates write the beginning-of-sequence token themselves, and tokenizers add it once more.
    doubled = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[1:] if doubled else ids


def pack(sequences: Sequence[Sequence[int]], *, max_length: int, batch_tokens: int = _BATCH_TOKENS) -> Iterator[Batch]:
    """Batches of sequences that are padded to the same length: a power of two times 32, or ``max_length``.

    Every sample keeps a sequence of its own. Several in one would see each other, and the first token of a sequence,
    whose activations are unlike all others, would be met less often than in use.

    Args:
        sequences: token ids; empty ones are left out.
        max_length: no sequence is longer.
        batch_tokens: positions in a batch at most, padding included; a batch has one row at least.

    >>> [tuple(batch.ids.shape) for batch in pack([[1] * 5, [1] * 40, [1] * 7], max_length=48)]
    [(2, 32), (1, 48)]
    """
    by_length: dict[int, list[Sequence[int]]] = {}
    for sequence in sequences:
        if sequence:
            length = _SHORTEST
            while length < len(sequence):
                length *= 2
            by_length.setdefault(min(length, max_length), []).append(sequence)
    for length, alike in sorted(by_length.items()):
        rows = max(1, batch_tokens // length)
        for start in range(0, len(alike), rows):
            chunk = alike[start : start + rows]
            # Padded with a token of the sample: a padding token would make models warn of a missing mask.
            ids = [[*sequence, *[sequence[0]] * (length - len(sequence))] for sequence in chunk]
            yield Batch(torch.tensor(ids), torch.tensor([len(sequence) for sequence in chunk]))


def sequences_of(batches: Iterable[Batch]) -> list[list[int]]:
    """The token ids of each sequence, without padding.

    >>> sequences_of(pack([[1] * 5, [2, 3]], max_length=32))
    [[1, 1, 1, 1, 1], [2, 3]]
    """
    return [
        ids[:length]
        for batch in batches
        for ids, length in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True)
    ]


def spread(batches: Sequence[Batch], max_tokens: int) -> tuple[Batch, ...]:
    """Sequences of all lengths, of at most so many tokens together, or one sequence.

    >>> [batch.lengths.tolist() for batch in spread(list(pack([[1] * n for n in range(1, 9)], max_length=32)), 18)]
    [[2, 4, 6]]
    """
    sequences = sequences_of(batches)
    every = math.ceil(sum(map(len, sequences)) / max_tokens)
    chosen = sequences[every // 2 :: every]
    while len(chosen) > 1 and sum(map(len, chosen)) > max_tokens:
        chosen.pop()
    return tuple(pack(chosen or sequences[:1], max_length=_widest(batches)))


def hold_out(text: CalibrationBatches, every: int, batch_tokens: int) -> tuple[CalibrationBatches, CalibrationBatches]:
    """Split a calibration set in two: most of it, and sequences of all lengths that are kept apart.

    Args:
        text: the calibration set.
        every: one sequence of so many is kept apart, one at least.
        batch_tokens: positions in a batch of the part kept apart, see :func:`pack`.

    Raises:
        CompressionError: fewer than two sequences, or none of two tokens to keep apart.

    >>> text = CalibrationBatches(tuple(pack([[i] * i for i in range(1, 9)], max_length=32)), 8, 36)
    >>> rest, apart = hold_out(text, every=4, batch_tokens=64)
    >>> rest.tokens, [batch.lengths.tolist() for batch in apart.batches]
    (24, [[4, 8]])
    """
    sequences = sequences_of(text.batches)
    # From the end, where the longest are: one that is kept apart has to have a token to predict.
    apart = sequences[::-1][::every][::-1]
    rest = [sequence for i, sequence in enumerate(sequences[::-1]) if i % every][::-1]
    if not rest or max(map(len, apart)) < 2:
        raise CompressionError(
            f"The calibration text has {len(sequences)} samples; max_kl needs two of a few words at least, since some "
            "are kept apart to measure on. Give a few hundred samples of what the expert is asked."
        )
    widest = _widest(text.batches)
    parts = (tuple(pack(rest, max_length=widest)), tuple(pack(apart, max_length=widest, batch_tokens=batch_tokens)))
    counts = (rest, apart)
    whole, held = (
        CalibrationBatches(batches, len(part), sum(map(len, part)))
        for batches, part in zip(parts, counts, strict=True)
    )
    return whole, held


def _widest(batches: Iterable[Batch]) -> int:
    return max(batch.ids.shape[1] for batch in batches)
