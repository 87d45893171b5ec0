"""Wrapped embeddings and output heads, whose experts change or add rows; a head may answer from its embedding's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from meswitch_kernels import RowsLeaves, embed_rows

from .. import ops
from ..module_kinds import linear_sizes
from .deltas import AnyRowsDelta, QuantizedRowsDelta
from .dense_cache import DenseCache, takes_whole_head
from .layer import MESwitchLayer
from .live_choice import is_replayed
from .rows_path import RowsPath, correct_logits, rows_leaves
from .switch import ExpertSwitch, join_rows, take_rows

__all__ = ["HeadLayer", "RowsLayer"]


class _KernelRowsLayer(MESwitchLayer):
    """What embedding and output head share: the table in which the kernels find the experts' rows."""

    coded_table: torch.Tensor | None
    rows_table: torch.Tensor | None

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__(base_layer, switch)
        self.rows_path = RowsPath(int(base_layer.weight.shape[1]))  # type: ignore[index]
        # Buffers, so that compiled code takes them for something that stays where it is.
        self.register_buffer("coded_table", None, persistent=False)
        self.register_buffer("rows_table", None, persistent=False)

    @property
    def has_table(self) -> bool:
        """Whether there are kernels for the layer."""
        return self.rows_table is not None

    def settle(self, expert: str) -> None:
        """Show the kernels where the expert's rows are."""
        if self.delta_of(expert) is None:
            return
        weight: torch.Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        if ops.runs_kernels(weight.device):
            self.rows_path.place(expert, self.switch.slots.of(expert), self._leaves(expert), weight.device)
            self.switch.live_on(weight.device)
        else:
            self.rows_path.drop()
        self.coded_table, self.rows_table = self.rows_path.tables

    def _leaves(self, expert: str) -> RowsLeaves | None:
        """The expert's rows here, or `None` where the kernels cannot have them."""
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str) -> None:
        """As of every wrapped layer; the kernels forget the expert, too."""
        self.rows_path.clear(adapter_name)
        super().delete_adapter(adapter_name)


class RowsLayer(_KernelRowsLayer):
    """An embedding: rows that an expert changed or added come from its delta."""

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__(base_layer, switch)
        self._heads: tuple[HeadLayer, ...] = ()
        self._scale = None

    def __getstate__(self) -> dict[str, Any]:
        """Heads find their embedding again; the other way round, copies would go in circles."""
        return {**self.__dict__, "_heads": ()}

    def followed_by(self, head: HeadLayer) -> None:
        """Tell a head, from now on, whenever the rows here that it answers from are others or elsewhere."""
        # In a tuple, so that the head is not registered as a part of this module.
        if not any(known is head for known in self._heads):
            self._heads = (*self._heads, head)

    def settle(self, expert: str) -> None:
        """Show the kernels where the expert's rows are; those of a tied head, too."""
        super().settle(expert)
        # Not in forward, where it may be a copy from the host, which graphs do not capture.
        self._scale = self._get_embed_scale()  # type: ignore[no-untyped-call]
        for head in self._heads:
            head.settle(expert)

    def _leaves(self, expert: str) -> RowsLeaves | None:
        delta = self.stored_delta(expert)
        assert isinstance(delta, AnyRowsDelta)
        return rows_leaves(delta, delta.record.num_rows, self.get_base_layer().weight.dtype)  # type: ignore[arg-type]

    @property
    def num_embeddings(self) -> int:
        """Ids that some resident expert (or the base) knows."""
        deltas: Iterable[Any] = self.meswitch_delta.values()
        return max([int(self.get_base_layer().num_embeddings), *(d.record.num_rows for d in deltas)])  # type: ignore[arg-type]

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return int(self.get_base_layer().embedding_dim)  # type: ignore[arg-type]

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Int ``[batch, ...]`` to ``[batch, ..., width]``."""
        if ids.shape[0] == 1:
            # GPT-2 looks its learned positions up once for all rows, but each row's expert has its own.
            ids = ids.expand(self.switch.rows_apart, *ids.shape[1:])
        weight: torch.Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        if self.rows_path.embeds(ids, weight) and not (self.merged_adapters or args or kwargs):
            return self._embed_all(ids, weight)
        groups = self.switch.groups(ids.shape[0], ids.device)
        if self.merged_adapters or all(self.delta_of(expert) is None for expert, _ in groups):
            return self.base_layer(ids, *args, **kwargs)
        parts = [(rows, self._embed(expert, take_rows(ids, rows), *args, **kwargs)) for expert, rows in groups]
        return join_rows(parts, ids.shape[0])

    def _embed_all(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Through the kernels: ``[batch, ..., width]`` for all experts at once."""
        index = self.switch.kernel_index(ids.shape[0], ids.device)
        if index is None:
            return self.base_layer(ids)
        base_rows, known = weight.shape[0], ids
        if self.rows_path.known > base_rows:
            # The base's row of a new id is not used. Ids that no expert knows fail as in the base's module.
            known = torch.where(ids < self.rows_path.known, ids.clamp_max(base_rows - 1), ids)
        assert self.coded_table is not None
        assert self.rows_table is not None
        base = self.base_layer(known)
        return embed_rows(ids, base, weight, self.coded_table, self.rows_table, index, scale=self._scale)

    def _embed(self, expert: str | None, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        delta = self.delta_of(expert)
        if delta is None:
            return self.base_layer(ids, *args, **kwargs)
        base_rows = int(self.get_base_layer().num_embeddings)  # type: ignore[arg-type]
        known = ids.clamp_max(base_rows - 1) if delta.record.num_rows > base_rows else ids
        base = self.base_layer(known, *args, **kwargs)
        weight = self.get_base_layer().weight
        return delta.embed(ids, base.to(ids.device), weight, self._get_embed_scale())

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """The expert's whole embedding."""
        delta = self.stored_delta(expert)
        assert isinstance(delta, AnyRowsDelta)
        return {"weight": delta.dense(self.get_base_layer().weight)}  # type: ignore[arg-type]

    def _swap_parameters(self, merged: dict[str, torch.Tensor]) -> None:
        super()._swap_parameters(merged)
        self.get_base_layer().num_embeddings = merged["weight"].shape[0]  # type: ignore[assignment]

    def _restore_parameters(self, kept: dict[str, Any]) -> None:
        super()._restore_parameters(kept)
        self.get_base_layer().num_embeddings = kept["weight"].shape[0]


class HeadLayer(_KernelRowsLayer):
    """The output head: an expert's own rows, or its input embedding's where both models tie them.

    The logits are as wide as the largest vocabulary loaded; ids that a row's expert does not know are ``-inf``.
    """

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__(base_layer, switch)
        # In a tuple, so that the embedding's tensors are not registered (and saved) a second time.
        self._tied: tuple[RowsLayer | None] = (None,)
        self._dense = DenseCache()
        self.out_features, self.in_features = linear_sizes(base_layer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._tied[0] is not None:
            self._tied[0].followed_by(self)

    def drop_cache(self) -> None:
        """As of every wrapped layer."""
        self._dense.clear()

    def tie(self, embedding: RowsLayer) -> None:
        """Answer for experts without rows of their own here from the embedding's rows."""
        self._tied = (embedding,)
        embedding.followed_by(self)

    def _leaves(self, expert: str) -> RowsLeaves | None:
        delta, embedding = self.delta_of(expert), self._tied[0]
        if super().delta_of(expert) is not None or embedding is None:
            weight: torch.Tensor = self.get_base_layer().weight  # type: ignore[assignment]
            leaves = rows_leaves(delta, self.switch.vocab_size(expert), weight.dtype)
        else:
            # The same map, too. Where the embedding has not settled yet, it will tell.
            of_embedding = embedding.rows_path.leaves.get(expert)
            if of_embedding is None:
                return None
            leaves = of_embedding
        shift = self._bias_shift(delta)
        if shift is None:
            return leaves
        bias = _of_length(shift, leaves.row_map.shape[0])
        return dataclasses.replace(leaves, bias=bias)

    def delta_of(self, expert: str | None) -> Any:
        """The expert's own rows here, else those of the embedding that it ties the head to."""
        own = super().delta_of(expert)
        embedding = self._tied[0]
        if own is None and embedding is not None and expert is not None and self.switch.experts[expert].tied:
            return embedding.delta_of(expert)
        return own

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[batch, ..., width]`` to ``[batch, ..., vocab_capacity]``."""
        if self.rows_path.takes(hidden, self.base_layer) and not (self.merged_adapters or args or kwargs):
            return self._correct_all(hidden, self.base_layer(hidden))
        groups = self.switch.groups(hidden.shape[0], hidden.device)
        capacity = self.switch.vocab_capacity
        deltas = [self.delta_of(expert) for expert, _ in groups]
        dense = self._dense.takes(hidden, self.base_layer) and not (self.merged_adapters or args or kwargs)
        if dense:
            self._dense.keep_only(deltas)
            # A head is large: where it cannot be kept, a mixed batch goes by blocks of each expert's.
            coded = [delta for delta in deltas if isinstance(delta, QuantizedRowsDelta)]
            dense = len(groups) == 1 or self._dense.has_room(coded)
        if dense and all(takes_whole_head(hidden, self.base_layer, delta) for delta in deltas):
            parts = [
                (rows, self._whole(take_rows(hidden, rows), delta, capacity))
                for delta, (_, rows) in zip(deltas, groups, strict=True)
            ]
            return join_rows(parts, hidden.shape[0])
        base = _widened(self.base_layer(hidden, *args, **kwargs), capacity)
        if self.merged_adapters:
            return base
        parts = [
            (rows, self._logits(expert, take_rows(hidden, rows), take_rows(base, rows), dense))
            for expert, rows in groups
        ]
        return join_rows(parts, hidden.shape[0])

    def _whole(self, hidden: torch.Tensor, delta: QuantizedRowsDelta, capacity: int) -> torch.Tensor:
        """``[rows, ..., vocab_capacity]`` by an expert's dense head."""
        return _widened(self._dense.whole_head(hidden, self.base_layer, delta)[..., :capacity], capacity)

    def _correct_all(self, hidden: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Through the kernels: ``[batch, ..., vocab_capacity]`` for all experts at once."""
        capacity = self.switch.widest_vocabulary if is_replayed() else self.switch.vocab_capacity
        groups = self.switch.kernel_groups(hidden.shape[0], math.prod(hidden.shape[1:-1]), hidden.device)
        if groups is None:
            return _widened(base, capacity)
        assert self.coded_table is not None
        assert self.rows_table is not None
        return correct_logits(hidden, base, (self.coded_table, self.rows_table), groups, capacity)

    def _logits(self, expert: str | None, hidden: torch.Tensor, base: torch.Tensor, dense: bool) -> torch.Tensor:
        delta = self.delta_of(expert)
        if delta is not None:
            if dense and isinstance(delta, QuantizedRowsDelta) and delta.record.coded_rows > 0:
                base = delta.logits(hidden, base, self._dense.rows(hidden, delta))
            else:
                base = delta.logits(hidden, base)
            shift = self._bias_shift(delta)
            if shift is not None:
                base = base.clone()
                base[..., : len(shift)] += shift.to(base.dtype)
        known = self.switch.vocab_size(expert)
        if known < base.shape[-1]:
            base = base.clone()
            base[..., known:] = float("-inf")
        return base

    def _bias_shift(self, delta: AnyRowsDelta) -> torch.Tensor | None:
        """What the expert's logits lack in bias, float32 ``[num_rows]``; `None` if nothing.

        Only logits that came from the base's rows carry the base's bias.
        """
        of_base, own_rows = getattr(self.get_base_layer(), "bias", None), delta.own_rows
        bias = delta.bias if delta.record.bias else of_base
        if bias is None or (not delta.record.bias and own_rows is None):
            return None
        shift = _of_length(bias, delta.record.num_rows)
        if of_base is not None:
            carried = _of_length(of_base, delta.record.num_rows)
            if own_rows is not None:
                carried[own_rows.long()] = 0
            shift -= carried
        return shift

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """The expert's whole output head."""
        base, delta = self.get_base_layer(), self.delta_of(expert)
        merged = {"weight": delta.dense(base.weight)}
        if delta.record.bias:
            merged["bias"] = delta.bias.to(base.weight.dtype)
        return merged

    def _checked_parameters(self, expert: str, safe: bool) -> dict[str, torch.Tensor]:
        delta = self.delta_of(expert)
        if delta is None:
            return {}
        embedding = self._tied[0]
        if super().delta_of(expert) is None and embedding is not None and embedding.merged_adapters:
            # Share the embedding's merged parameter, so that the merged model is tied like the expert.
            return {"weight": embedding.get_base_layer().weight}  # type: ignore[dict-item]
        return super()._checked_parameters(expert, safe)

    def _swap_parameters(self, merged: dict[str, torch.Tensor]) -> None:
        base = self.get_base_layer()
        self._unmerged = {name: base._parameters[name] for name in merged}
        for name, tensor in merged.items():
            shared = isinstance(tensor, nn.Parameter)
            base._parameters[name] = tensor if shared else nn.Parameter(tensor, requires_grad=False)  # type: ignore[assignment]
        if "weight" in merged:
            base.out_features = merged["weight"].shape[0]  # type: ignore[assignment]

    def _restore_parameters(self, kept: dict[str, Any]) -> None:
        super()._restore_parameters(kept)
        if "weight" in kept:
            self.get_base_layer().out_features = kept["weight"].shape[0]


def _widened(logits: torch.Tensor, capacity: int) -> torch.Tensor:
    """Logits ``[..., vocab]`` of ids that nobody knows added at ``-inf``: ``[..., capacity]``."""
    more = capacity - logits.shape[-1]
    return nn.functional.pad(logits, (0, more), value=float("-inf")) if more > 0 else logits


def _of_length(bias: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of a bias in float32, cut to ``length`` or filled up with zeros."""
    full = torch.zeros(length, dtype=torch.float32, device=bias.device)
    full[: len(bias)] = bias[:length]
    return full
