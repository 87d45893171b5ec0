"""Greedy answers to many prompts at once, through transformers' own model.

Two things make it quick: a static cache, so that one decode step is the same work every time and can be replayed as a
CUDA graph; and weights that are exchanged in place, so that the graphs of one expert serve all methods.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, StaticCache
from transformers.masking_utils import sdpa_mask

__all__ = ["ATTENTION", "GreedyDecoder"]

#: Name of :func:`packed_attention` for ``attn_implementation``.
ATTENTION = "meswitch_benchmark_packed"
#: The length of a cache is a multiple of this, so that few shapes occur and masks are aligned.
_ROUND_TO = 32
#: Whether all rows have ended is asked once in so many steps, since asking makes the host wait for the device.
_CHECK_EVERY = 8
#: Shapes whose caches and graphs are kept.
_SHAPES = 3


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """SDPA in which the query heads of one key head stand in the place of query positions when decoding.

    Grouped-query attention with a mask otherwise copies the whole cache once for every group.

    Args:
        module: the attention layer.
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, key_heads, slots, head_dim]``; in a prefill, slots past ``length`` are not looked at.
        value: as ``key``.
        attention_mask: bool or additive, ``[batch, 1, length, slots]``; `None` is causal.
        scaling: of the scores.
        dropout: of the probabilities.

    Returns:
        ``[batch, length, heads, head_dim]``, and nothing in place of the probabilities.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if length == 1 and attention_mask is not None:
        packed = query.reshape(batch, heads // groups, groups, width)
        output = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
        return output.reshape(batch, 1, heads, width), None
    key, value = (tensor[:, :, :length].repeat_interleave(groups, dim=1) for tensor in (key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=attention_mask is None
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class GreedyDecoder:
    """Greedy decoding of a plain dense causal LM whose attention is :data:`ATTENTION`.

    Args:
        model: in evaluation mode, with a vocabulary and shapes that stay; its weights may be written in place.
        end_token_id: ends an answer.
        graphs: whether to replay decode steps as CUDA graphs.
    """

    def __init__(self, model: PreTrainedModel, end_token_id: int, *, graphs: bool) -> None:
        self._model = model
        self._end = end_token_id
        self._graphs = graphs
        self._states: OrderedDict[tuple[int, int, int], _State] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> list[list[int]]:
        """Token ids of each answer, in order, without the end token.

        Args:
            prompts: token ids of each prompt, at least one each.
            max_new_tokens: where an answer is cut off that does not end.
            batch_size: prompts at once, at most; batches are of one size.
        """
        if not prompts:
            return []
        size = math.ceil(len(prompts) / math.ceil(len(prompts) / batch_size))
        # Prompts of like length go together; the last batch is filled with copies of its last prompt.
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            rows = [prompts[number] for number in numbers]
            rows += [rows[-1]] * (size - len(rows))
            found = self._batch(rows, max_new_tokens)
            for number, ids in zip(numbers, found, strict=False):
                answers[number] = ids[: ids.index(self._end)] if self._end in ids else ids
        return answers

    def _batch(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        state = self._state(len(rows), max(map(len, rows)), max_new_tokens)
        state.prefill(rows)
        for step in range(1, max_new_tokens):
            if step % _CHECK_EVERY == 0 and bool(state.ended.all()):
                break
            state.advance()
        generated: list[list[int]] = state.generated.tolist()
        return generated

    def _state(self, rows: int, width: int, max_new_tokens: int) -> _State:
        slots = math.ceil((max(2, width) + max_new_tokens) / _ROUND_TO) * _ROUND_TO
        key = (rows, slots, max_new_tokens)
        if key not in self._states:
            while len(self._states) >= _SHAPES:
                self._states.popitem(last=False)
            self._states[key] = _State(self._model, self._end, rows, slots, max_new_tokens, graphs=self._graphs)
        self._states.move_to_end(key)
        return self._states[key]


class _State:
    """The cache and buffers of one shape, and the graph of a decode step on them.

    ``slots`` is the length of the cache; prompts are padded on the left to a width of their own in every batch.
    """

    def __init__(
        self, model: PreTrainedModel, end: int, rows: int, slots: int, max_new_tokens: int, *, graphs: bool
    ) -> None:
        device, dtype = model.device, model.dtype
        self._model, self._end = model, end
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._cache = StaticCache(config=model.config, max_cache_len=slots)
        self._forbidden = torch.finfo(dtype).min
        self._bias = torch.empty(rows, 1, 1, slots, dtype=dtype, device=device)
        self._allowed = torch.zeros(rows, 1, 1, 1, dtype=dtype, device=device)
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.generated = torch.empty(rows, max_new_tokens, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if graphs and max_new_tokens > 1:
            self._capture()

    def _capture(self) -> None:
        """Record a decode step; what it does to the buffers on the way is undone by the next prefill."""
        self.prefill([[self._end]] * len(self._tokens))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries set themselves up in a first run, which must not happen inside a capture.
            self._decode()
            self._step.fill_(0)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode()
        self._graph = graph

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Start on new prompts, and decode their first tokens."""
        # At least two, since one position is a decode step to the attention.
        width = max(2, *map(len, rows))
        device = self._tokens.device
        ids = torch.tensor([[self._end] * (width - len(row)) + list(row) for row in rows]).to(device)
        padding = torch.tensor([width - len(row) for row in rows], device=device)
        place = torch.arange(width, device=device)
        real = place >= padding[:, None]
        seen = real[:, None, :] & (place <= place[:, None])
        # A padding position sees itself, since a softmax over nothing is not a number.
        seen = (seen | torch.eye(width, dtype=torch.bool, device=device))[:, None]
        # Zeros and not only the length: what an earlier model left could be infinite, and 0 * inf is not a number.
        self._cache.reset()
        hidden = self._model.base_model(
            input_ids=ids,
            attention_mask=torch.where(seen, 0.0, self._forbidden).to(self._bias.dtype),
            position_ids=(place - padding[:, None]).clamp_min(0),
            use_cache=True,
            **{self._cache_name: self._cache},
        ).last_hidden_state[:, -1]
        self._bias.fill_(self._forbidden)
        self._bias[:, 0, 0, :width].masked_fill_(real, 0.0)
        self._positions.copy_((width - padding)[:, None])
        self._slot.fill_(width)
        self._step.fill_(0)
        self.ended.fill_(False)
        self.generated.fill_(self._end)
        self._take(self._model.lm_head(hidden))

    def advance(self) -> None:
        """Decode one more token of every row."""
        if self._graph is None:
            self._decode()
        else:
            self._graph.replay()

    def _decode(self) -> None:
        self._bias.index_copy_(3, self._slot, self._allowed)
        hidden = self._model.base_model(
            input_ids=self._tokens,
            attention_mask=self._bias,
            position_ids=self._positions,
            use_cache=True,
            **{self._cache_name: self._cache},
        ).last_hidden_state[:, -1]
        self._positions.add_(1)
        self._slot.add_(1)
        self._take(self._model.lm_head(hidden))

    def _take(self, logits: Tensor) -> None:
        """Write down the likeliest token of each row; rows that have ended go on with end tokens."""
        token = logits.argmax(dim=-1).masked_fill(self.ended, self._end)
        self.ended.logical_or_(token == self._end)
        self.generated.index_copy_(1, self._step, token[:, None])
        self._tokens.copy_(token[:, None])
        self._step.add_(1)
