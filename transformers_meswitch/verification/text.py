"""Text to compare models on: in pieces of token ids, and what a model predicts of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..compression.calibration import Calibration, read_samples
from ..compression.sources import Source
from ..delta_format.location import RepoLocation
from ..errors import VerificationError

__all__ = ["MIN_TOKENS", "logits_of", "read_pieces", "tokenizer_of"]

#: Longer samples are cut into pieces of this length. It bounds the logits in memory: 512 × vocabulary numbers a model.
_PIECE = 512
#: Fewer tokens than this say nothing; it is a guard against a wrong file, not advice.
MIN_TOKENS = 32


def tokenizer_of(expert: RepoLocation) -> PreTrainedTokenizerBase:
    """The tokenizer of a repo.

    Raises:
        VerificationError: it has none that can be read.
    """
    where: dict[str, Any] = {
        "revision": expert.revision,
        "token": expert.token,
        "cache_dir": expert.cache_dir,
        "local_files_only": expert.local_files_only,
    }
    try:
        return AutoTokenizer.from_pretrained(expert.repo, **where)
    except (OSError, ValueError) as error:
        raise VerificationError(
            f"Running text needs the tokenizer of {expert}, which cannot be read: {error} Save the expert's tokenizer "
            "beside it, or leave the text out to compare the weights only."
        ) from error


def read_pieces(
    tokenizer: PreTrainedTokenizerBase, texts: Calibration, source: Source, max_tokens: int
) -> list[list[int]]:
    """Token ids of text in pieces that a model has positions for.

    Args:
        tokenizer: the expert's.
        texts: see :func:`~transformers_meswitch.compression.calibration.read_samples`.
        source: the model's checkpoint.
        max_tokens: how much of the text to take at most.

    Raises:
        CompressionError: text that cannot be read.
        VerificationError: too little of it.
    """
    pieces = list(_pieces(tokenizer, read_samples(texts, tokenizer), _length(source), max_tokens))
    if sum(map(len, pieces)) < MIN_TOKENS:
        raise VerificationError(
            f"The text has {sum(map(len, pieces))} tokens, expected at least {MIN_TOKENS}, and a few thousand for "
            "numbers to rely on. Give samples of what the expert is asked and answers."
        )
    return pieces


def _pieces(
    tokenizer: PreTrainedTokenizerBase, samples: Iterable[str], length: int, max_tokens: int
) -> Iterator[list[int]]:
    """Token ids of each sample, in pieces of 2 to ``length``, up to ``max_tokens`` in all."""
    left = max_tokens
    for sample in samples:
        ids = tokenizer(sample, verbose=False)["input_ids"][:left]
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            # The first token of a piece is not predicted, so one alone tells nothing.
            if len(piece) > 1:
                left -= len(piece)
                yield piece
        if left < 2:
            return


def _length(source: Source) -> int:
    return min(_PIECE, getattr(source.config.get_text_config(), "max_position_embeddings", None) or _PIECE)


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    """What a model predicts after each of the tokens but the last: ``[len(ids) - 1, vocabulary]`` in its own dtype."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
