"""Experts' rows of an embedding or output head in plain torch: what the kernels are tested against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .delta_leaves import DeltaLeaves
from .reference import dequantize_delta_reference
from .rows_leaves import BASE_ROW, RowsLeaves

__all__ = ["embed_rows_reference", "head_rows_reference"]


def embed_rows_reference(
    ids: torch.Tensor,
    base_out: torch.Tensor,
    weight: torch.Tensor,
    experts: Sequence[RowsLeaves | None],
    expert_index: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replace the embeddings of coded and own rows; arguments as of :func:`meswitch_kernels.embed_rows`.

    Args:
        ids: int ``[tokens]``.
        base_out: ``[tokens, width]``.
        weight: ``[base rows, width]``.
        experts: the rows by slot, `None` for an empty slot.
        expert_index: int ``[tokens]``, the slot of each token's expert; negative for the base.
        scale: one element, or `None`.

    Returns:
        ``[tokens, width]`` of the dtype of ``base_out``.
    """
    out = base_out.clone()
    for expert, tokens in _tokens_by_expert(experts, expert_index):
        here = tokens[(ids[tokens] >= 0) & (ids[tokens] < len(expert.row_map))]
        place = expert.row_map[ids[here].long()].long()
        coded, own = here[place > BASE_ROW], here[place < BASE_ROW]
        if len(coded) and expert.coded is not None:
            delta = _dense(expert.coded, place[place > BASE_ROW], weight.shape[1])
            rows = (weight[ids[coded].long()].float() + delta).to(out.dtype)
            out[coded] = rows if scale is None else rows * scale.to(out.dtype)
        if len(own) and expert.own is not None:
            rows = expert.own[BASE_ROW - 1 - place[place < BASE_ROW]].to(out.dtype)
            out[own] = rows if scale is None else rows * scale.to(out.dtype)
    return out


def head_rows_reference(
    x: torch.Tensor,
    base_out: torch.Tensor,
    experts: Sequence[RowsLeaves | None],
    expert_index: torch.Tensor,
    *,
    capacity: int,
) -> torch.Tensor:
    """Correct the logits of coded rows, replace those of own rows; arguments as of :func:`meswitch_kernels.head_rows`.

    Args:
        x: ``[rows, width]``.
        base_out: ``[rows, base rows]``.
        experts: the rows by slot, `None` for an empty slot.
        expert_index: int ``[rows]``, the slot of each row's expert; negative for the base.
        capacity: ids of the result.

    Returns:
        ``[rows, capacity]`` of the dtype of ``base_out``.
    """
    width = max(capacity, base_out.shape[1])
    logits = torch.full((x.shape[0], width), float("-inf"), device=x.device)
    logits[:, : base_out.shape[1]] = base_out.float()
    for expert, rows in _tokens_by_expert(experts, expert_index):
        ids = torch.arange(len(expert.row_map), device=x.device)
        coded, own = ids[expert.row_map > BASE_ROW], ids[expert.row_map < BASE_ROW]
        theirs, inputs = logits[rows], x[rows].float()
        if len(coded) and expert.coded is not None:
            theirs[:, coded] += inputs @ _dense(expert.coded, expert.row_map[coded].long(), x.shape[1]).T
        if len(own) and expert.own is not None:
            theirs[:, own] = inputs @ expert.own[BASE_ROW - 1 - expert.row_map[own].long()].to(x.dtype).float().T
        if expert.bias is not None:
            theirs[:, : len(ids)] += expert.bias
        theirs[:, len(ids) :] = float("-inf")
        logits[rows] = theirs
    return logits[:, :capacity].to(base_out.dtype)


def _tokens_by_expert(
    experts: Sequence[RowsLeaves | None], expert_index: torch.Tensor
) -> Iterator[tuple[RowsLeaves, torch.Tensor]]:
    for slot in sorted({slot for slot in expert_index.tolist() if slot >= 0}):
        expert = experts[slot]
        if expert is not None:
            yield expert, (expert_index == slot).nonzero()[:, 0]


def _dense(coded: DeltaLeaves, places: torch.Tensor, width: int) -> torch.Tensor:
    salient = None if coded.salient is None else coded.salient[places]
    return dequantize_delta_reference(
        coded.codes[places],
        coded.step[places],
        coded.bits,
        width,
        salient_index=coded.salient_index,
        salient=salient,
    )
