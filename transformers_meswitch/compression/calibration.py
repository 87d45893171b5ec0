"""How strongly each input channel of each linear is used: the mean square of it over calibration text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CompressionError
from ..module_kinds import is_linear, linear_sizes

__all__ = ["Calibration", "collect_second_moments", "read_samples"]

#: Texts; or a ``.txt`` or ``.jsonl`` file; or the id of a data set.
Calibration = str | os.PathLike[str] | Sequence[str]

#: Fewer tokens than this say nothing about thousands of channels; it is a guard against a wrong file, not advice.
_MIN_TOKENS = 32
#: Longer samples are cut into pieces of this length, which bounds the memory of a forward pass.
_MAX_LENGTH = 2048


def read_samples(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts of a calibration set, one after the other.

    Args:
        calibration: texts; the path of a ``.txt`` file (one sample a line) or of a ``.jsonl`` file, whose objects have
            ``text``, or ``messages`` (a chat), or ``prompt`` and ``completion``; or the id of a data set whose
            ``train`` split has such rows (needs the ``datasets`` package).
        tokenizer: the expert's; its chat template renders ``messages``.

    Raises:
        CompressionError: a file or row that cannot be read, ``datasets`` missing.

    >>> list(read_samples(["One text.", "Another."], tokenizer=None))
    ['One text.', 'Another.']
    """
    if not isinstance(calibration, str | os.PathLike):
        for i, text in enumerate(calibration):
            if not isinstance(text, str):
                raise CompressionError(f"calibration[{i}] is {type(text).__name__}, expected a string.")
            yield text
        return
    path = Path(calibration)
    if path.suffix not in (".txt", ".jsonl"):
        yield from (_text(row, tokenizer, f"row of {calibration}") for row in _dataset(os.fspath(calibration)))
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CompressionError(f"The calibration file {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield line
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CompressionError(f"{path}, line {number} is not JSON: {error}") from error
        yield _text(row, tokenizer, f"{path}, line {number}")


def _dataset(name: str) -> Iterable[dict[str, Any]]:
    if Path(name).exists():
        raise CompressionError(f"The calibration file {name} is neither .txt nor .jsonl.")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise CompressionError(
            f"calibration={name!r} is not a .txt or .jsonl file, so it is taken for the id of a data set, which needs "
            "the datasets package: pip install datasets"
        ) from error
    return load_dataset(name, split="train", streaming=True)


def _text(row: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """One sample of a row of any of the three kinds."""
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if isinstance(prompt, list) and isinstance(completion, list):
            row = {"messages": prompt + completion}
        if isinstance(row.get("messages"), list):
            if not tokenizer.chat_template:
                raise CompressionError(f"{where} is a chat, but the expert's tokenizer has no chat template.")
            return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    raise CompressionError(
        f'{where} is {str(row)[:80]!r}, expected an object with "text", "messages", or "prompt" and "completion".'
    )


def collect_second_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[str],
    *,
    max_tokens: int,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Run text through a model and average the square of every input of every linear.

    Args:
        model: the expert, with its weights, in evaluation mode.
        tokenizer: the expert's.
        samples: texts; read only as far as ``max_tokens`` asks.
        max_tokens: how many tokens to run at most.
        progress: whether to show a progress bar.

    Returns:
        Canonical name of each linear that was reached to float32 ``[in]`` on the CPU.

    Raises:
        CompressionError: fewer than 32 tokens of text.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str, width: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0].detach().reshape(-1, width)
            # Summed over a piece where it is, over pieces in float64 on the CPU: some accelerators have no float64.
            total = inputs.to(torch.float32).square().sum(dim=0).cpu().double()
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + len(inputs)

        return add

    handles = [
        module.register_forward_pre_hook(hook(name, linear_sizes(module)[1]))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    length = min(_MAX_LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", None) or _MAX_LENGTH)
    seen = 0
    try:
        with torch.inference_mode(), tqdm(total=max_tokens, desc="Calibrating", disable=not progress) as bar:
            for piece in _pieces(tokenizer, samples, length):
                piece = piece[: max_tokens - seen]
                model(input_ids=torch.tensor([piece], device=model.device), use_cache=False)
                seen += len(piece)
                bar.update(len(piece))
                if seen >= max_tokens:
                    break
    finally:
        for handle in handles:
            handle.remove()
    if seen < _MIN_TOKENS:
        raise CompressionError(
            f"The calibration text has {seen} tokens, expected at least {_MIN_TOKENS}. Give a few hundred samples of "
            "what the expert is asked, or leave calibration out to choose salient channels by weight error."
        )
    return {name: (total / counts[name]).to(torch.float32) for name, total in sums.items()}


def _pieces(tokenizer: PreTrainedTokenizerBase, samples: Iterable[str], length: int) -> Iterator[list[int]]:
    """Token ids of each sample, in pieces of at most ``length``."""
    for sample in samples:
        ids = tokenizer(sample, verbose=False)["input_ids"]
        yield from (ids[start : start + length] for start in range(0, len(ids), length))
