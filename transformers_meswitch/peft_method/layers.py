"""Wrapped layers: the base's module beside the deltas of the experts that change it.

Each runs the base's own module on all rows and lets every expert in the batch correct its rows. The choice of experts
is read from the model's :class:`~transformers_meswitch.peft_method.switch.ExpertSwitch`, never from the layer.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from meswitch_kernels import RowsLeaves, embed_rows

from .. import ops
from ..delta_format.spec import ModuleRecord
from ..errors import UnsupportedOperationError
from ..module_kinds import is_conv1d, linear_sizes
from .deltas import AnyRowsDelta, LinearDelta, QuantizedRowsDelta, StoredDelta, ValuesDelta, make_delta
from .dense_cache import DenseCache
from .kernel_path import KernelPath
from .live_choice import is_replayed
from .naming import module_key
from .rows_path import RowsPath, correct_logits, rows_leaves
from .switch import ExpertSwitch
from .values_stack import ValuesStack, run_with_rows, takes_rows

__all__ = ["HeadLayer", "LinearLayer", "MESwitchLayer", "RowsLayer", "ValuesLayer", "wrap"]


def _settle_after_load(layer: Any, _: Any) -> None:
    """Tensors may be other ones now, and what was worked out of them is of the old values."""
    layer._settle_all()


class MESwitchLayer(nn.Module, BaseTunerLayer):
    """What all wrapped layers share: the deltas, PEFT's calls, and merging with a kept copy of the base's weights."""

    # Nothing here is trainable, and PEFT would set requires_grad on integer codes if it were told otherwise.
    adapter_layer_names = ()
    other_param_names = ("meswitch_delta",)

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.switch = switch
        self.meswitch_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Any] | None = None
        self.register_load_state_dict_post_hook(_settle_after_load)

    def __getattr__(self, name: str) -> Any:
        """What this layer lacks is the base module's, such as a norm's ``variance_epsilon``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            # What libraries hang on a module by underscored names (hooks) must not be seen twice.
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)

    # -- what an expert stores here ---------------------------------------------------------------------------------

    def add_delta(self, expert: str, record: ModuleRecord) -> None:
        """Make room for an expert's tensors, on the base layer's device."""
        parameter = next(self.get_base_layer().parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.get_default_dtype()
        self.meswitch_delta[module_key(expert)] = make_delta(record, dtype, parameter.device)

    def settle(self, expert: str) -> None:
        """Take note of an expert's tensors, which are all there now or have been moved."""

    @property
    def has_table(self) -> bool:
        """Whether there is something here that compiled code and graphs read to find experts."""
        return False

    def delta_of(self, expert: str | None) -> Any:
        """The expert's delta of this layer, or `None` where it does not differ from the base (or is the base)."""
        return None if expert is None else self.meswitch_delta._modules.get(module_key(expert))

    def stored_delta(self, expert: str) -> StoredDelta:
        """The expert's delta of this layer; it must have one."""
        return self.meswitch_delta[module_key(expert)]  # type: ignore[return-value]

    # -- PEFT's calls: the state is the switch's, so all layers agree ------------------------------------------------

    @property
    def active_adapter(self) -> list[str]:  # type: ignore[override]
        """Adapters active in the whole model."""
        return list(self.switch.active)

    @property
    def disable_adapters(self) -> bool:  # type: ignore[override]
        """Whether adapters are off in the whole model."""
        return self.switch.disabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active in the whole model; see :meth:`ExpertSwitch.set_active`."""
        self.switch.set_active([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def enable_adapters(self, enabled: bool) -> None:
        """Turn adapters on or off in the whole model; turning them off unmerges this layer, as PEFT does."""
        if not enabled:
            self.unmerge()
        self.switch.disabled = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an expert's tensors; if it was active, the alphabetically first remaining expert becomes so."""
        self.drop_cache()
        if module_key(adapter_name) in self.meswitch_delta:
            del self.meswitch_delta[module_key(adapter_name)]
        self.switch.forget(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return {name for name in self.switch.experts if self.delta_of(name) is not None}

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._get_available_adapters())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        delta = self.delta_of(adapter_name)
        target = device or next(self.get_base_layer().parameters()).device
        if delta is not None and target.type != "meta":
            delta.to(target)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never: a delta is of full rank."""
        return False

    # -- merging ----------------------------------------------------------------------------------------------------

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """The expert's own parameters of this layer, as the base's module would hold them. Changes nothing."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write an expert into the base's module, keeping the base's own parameters for :meth:`unmerge`.

        Args:
            safe_merge: refuse non-finite results before anything changes.
            adapter_names: the expert; the active one if `None`.

        Raises:
            UnsupportedOperationError: more than one expert, or a quantised base.
            ValueError: ``safe_merge`` and a non-finite weight.
        """
        names = [n for n in (adapter_names or self.switch.active) if n in self.switch.experts]
        if len(names) > 1:
            raise UnsupportedOperationError(f"Only one expert can be merged at a time, got {names}.")
        if not names or self.merged_adapters == names:
            return
        if self.merged_adapters:
            raise UnsupportedOperationError(
                f"Expert {self.merged_adapters[0]!r} is merged already; call unmerge_adapter() before merging another."
            )
        if self.delta_of(names[0]) is not None or isinstance(self, HeadLayer):
            self._swap_parameters(self._checked_parameters(names[0], safe_merge))
        self.drop_cache()
        self.merged_adapters = names
        self.switch.merged = names[0]

    def check_merge(self, expert: str, safe_merge: bool) -> None:
        """Raise what :meth:`merge` would raise, without merging."""
        if self.delta_of(expert) is not None:
            self._refuse_quantised()
            if safe_merge:
                self._checked_parameters(expert, safe_merge)

    def unmerge(self) -> None:
        """Put the base's own parameters back: the very tensors that :meth:`merge` set aside."""
        if self._unmerged is not None:
            self._restore_parameters(self._unmerged)
            self._unmerged = None
        if self.merged_adapters:
            self.merged_adapters = []
            self.switch.merged = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> MESwitchLayer:
        # What unmerge() puts back must have followed model.to(...) as if it had never been set aside.
        super()._apply(fn, *args, **kwargs)
        if self._unmerged is not None:
            aside = nn.Module()
            aside._parameters.update(self._unmerged)
            self._unmerged = aside._apply(fn, *args, **kwargs)._parameters
        self._settle_all()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._settle_all()

    def drop_cache(self) -> None:
        """Give back the memory of what is worked out of tensors and kept, which layers of some kinds do."""

    def _settle_all(self) -> None:
        self.drop_cache()
        for expert in self.switch.experts:
            if expert != self.switch.pending:
                self.settle(expert)

    def _refuse_quantised(self) -> None:
        base = self.get_base_layer()
        quantised = next((n for n, p in base.named_parameters(recurse=False) if not p.is_floating_point()), None)
        if quantised is not None:
            raise UnsupportedOperationError(
                f"{type(base).__name__}.{quantised} is quantised; merging would round the expert away. Load the base "
                "without quantization_config to merge."
            )

    def _checked_parameters(self, expert: str, safe: bool) -> dict[str, torch.Tensor]:
        base = self.get_base_layer()
        self._refuse_quantised()
        merged = self.merged_parameters(expert)
        for name, tensor in merged.items():
            if safe and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"Merging expert {expert!r} gives non-finite values in {type(base).__name__}.{name}; the base "
                    "weights were left as they are."
                )
        return merged

    def _swap_parameters(self, merged: dict[str, torch.Tensor]) -> None:
        base = self.get_base_layer()
        self._unmerged = {name: base._parameters[name] for name in merged}
        for name, tensor in merged.items():
            base._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def _restore_parameters(self, kept: dict[str, Any]) -> None:
        self.get_base_layer()._parameters.update(kept)


class LinearLayer(MESwitchLayer):
    """A linear (``nn.Linear``, ``Conv1D``, bitsandbytes 4/8-bit): ``y = base(x) + x Δ̂ᵀ`` per row's expert."""

    kernel_table: torch.Tensor | None

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__(base_layer, switch)
        self.out_features, self.in_features = linear_sizes(base_layer)
        self._kernels = KernelPath(self.out_features, self.in_features)
        self._dense = DenseCache()
        # A buffer, so that compiled code takes it for something that stays where it is.
        self.register_buffer("kernel_table", None, persistent=False)

    @property
    def has_table(self) -> bool:
        """Whether there are kernels for the layer."""
        return self.kernel_table is not None

    def settle(self, expert: str) -> None:
        """Show the kernels where the expert's tensors are, unless something stands in for a delta here."""
        delta = self.delta_of(expert)
        if delta is not None and all(isinstance(found, LinearDelta) for found in self.meswitch_delta.values()):
            base_bias = getattr(self.get_base_layer(), "bias", None)
            self._kernels.place(expert, self.switch.slots.of(expert), delta, base_bias)
            self.kernel_table = self._kernels.rows
            if self.kernel_table is not None:
                self.switch.live_on(self.kernel_table.device)
                self.switch.scratch_on(self.kernel_table.device)

    def drop_cache(self) -> None:
        """As of every wrapped layer."""
        self._dense.clear()

    def stand_in(self, expert: str, delta: nn.Module) -> None:
        """Let another module answer for an expert's delta: called as one, with a ``record`` and maybe a ``bias``.

        What kernels and the cache know of the layer's experts is forgotten, and the module is called instead.
        """
        self.meswitch_delta[module_key(expert)] = delta
        self._kernels = KernelPath(self.out_features, self.in_features)
        self.kernel_table = None
        self.drop_cache()

    def delete_adapter(self, adapter_name: str) -> None:
        """As of every wrapped layer; the kernels forget the expert, too."""
        self._kernels.clear(adapter_name)
        super().delete_adapter(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[batch, ..., in]`` to ``[batch, ..., out]``, in the dtype that the base's module returns."""
        if self._kernels.takes(x, self.base_layer) and not (self.merged_adapters or args or kwargs):
            by_expert = self.switch.kernel_groups(x.shape[0], math.prod(x.shape[1:-1]), x.device)
            if by_expert is None:
                return self.base_layer(x)
            assert self.kernel_table is not None
            return self._kernels.multiply(x, self.base_layer, self.kernel_table, by_expert)
        groups = self.switch.groups(x.shape[0], x.device)  # refuses rows of others than the expert that is merged
        if self.merged_adapters or all(self.delta_of(expert) is None for expert, _ in groups):
            return self.base_layer(x, *args, **kwargs)
        prefill = None if args or kwargs else self._kernels.prefill(x, self.base_layer)
        if prefill is not None:
            return prefill.multiply(x, groups, self.switch.scratch_on(x.device))
        alone = self.delta_of(groups[0][0]) if groups[0][1] is None else None
        if isinstance(alone, LinearDelta) and self._dense.takes(x, self.base_layer) and not (args or kwargs):
            return self._with_bias(self._dense.multiply(x, self.base_layer, alone), alone)
        y = self.base_layer(x, *args, **kwargs)
        for expert, rows in groups:
            delta = self.delta_of(expert)
            if delta is None:
                continue
            part = self._with_bias(delta(x if rows is None else x[rows]), delta).to(y.dtype)
            y = y + part if rows is None else y.index_add(0, rows, part)
        return y

    def _with_bias(self, y: torch.Tensor, delta: LinearDelta) -> torch.Tensor:
        """Output ``[..., out]`` of a delta, and of the base or not, with the difference of biases."""
        if not delta.record.bias:
            return y
        own = delta.bias.float()
        base = getattr(self.get_base_layer(), "bias", None)
        return y + (own if base is None else own - base.float()).to(y.dtype)

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """Weight ``W + Δ̂``, added in float32, and the expert's own bias."""
        base, delta = self.get_base_layer(), self.stored_delta(expert)
        assert isinstance(delta, LinearDelta)
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        merged_weight = delta.merged_into(weight.T).T if is_conv1d(base) else delta.merged_into(weight)
        merged = {"weight": merged_weight.contiguous()}
        if delta.record.bias:
            merged["bias"] = delta.bias.to(weight.dtype)
        return merged


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
        if groups[0][1] is None:
            return self._embed(groups[0][0], ids, *args, **kwargs)
        parts = [(rows, self._embed(expert, ids[rows], *args, **kwargs)) for expert, rows in groups]
        first = parts[0][1]
        out = first.new_empty(ids.shape[0], *first.shape[1:])
        for rows, part in parts:
            out[rows] = part
        return out

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
        alone = self.delta_of(groups[0][0]) if groups[0][1] is None and not self.merged_adapters else None
        if isinstance(alone, QuantizedRowsDelta) and self._dense.takes(hidden, self.base_layer):
            own = self._dense.whole_head(hidden, self.base_layer, alone)
            if own is not None:
                return nn.functional.pad(own, (0, capacity - own.shape[-1]), value=float("-inf"))
        base = self.base_layer(hidden, *args, **kwargs)
        if capacity > base.shape[-1]:
            base = nn.functional.pad(base, (0, capacity - base.shape[-1]), value=float("-inf"))
        if self.merged_adapters:
            return base
        if groups[0][1] is None:
            return self._logits(groups[0][0], hidden, base, alone=True)
        for expert, rows in groups:
            part = self._logits(expert, hidden[rows], base[rows])
            base = base.index_copy(0, rows, part)
        return base

    def _correct_all(self, hidden: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Through the kernels: ``[batch, ..., vocab_capacity]`` for all experts at once."""
        capacity = self.switch.widest_vocabulary if is_replayed() else self.switch.vocab_capacity
        groups = self.switch.kernel_groups(hidden.shape[0], math.prod(hidden.shape[1:-1]), hidden.device)
        if groups is None:
            return nn.functional.pad(base, (0, capacity - base.shape[-1]), value=float("-inf"))
        assert self.coded_table is not None
        assert self.rows_table is not None
        return correct_logits(hidden, base, (self.coded_table, self.rows_table), groups, capacity)

    def _logits(
        self, expert: str | None, hidden: torch.Tensor, base: torch.Tensor, *, alone: bool = False
    ) -> torch.Tensor:
        delta = self.delta_of(expert)
        if delta is not None:
            # Only where one expert answers all rows: experts in turn would each push the other out.
            cached = alone and isinstance(delta, QuantizedRowsDelta) and delta.record.coded_rows > 0
            if cached and self._dense.takes(hidden, self.base_layer):
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


def _of_length(bias: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of a bias in float32, cut to ``length`` or filled up with zeros."""
    full = torch.zeros(length, dtype=torch.float32, device=bias.device)
    full[: len(bias)] = bias[:length]
    return full


class ValuesLayer(MESwitchLayer):
    """A small module (a norm) that an expert runs with its own parameters."""

    stack: ValuesStack | None

    def __init__(self, base_layer: nn.Module, switch: ExpertSwitch) -> None:
        super().__init__(base_layer, switch)
        self.stack = None

    @property
    def has_table(self) -> bool:
        """Whether the experts' parameters are in a stack."""
        return self.stack is not None

    def settle(self, expert: str) -> None:
        """Enter the expert's parameters in the stack, where there are kernels and rows can have parameters apart."""
        base, delta = self.get_base_layer(), self.delta_of(expert)
        device = next(base.parameters()).device
        if delta is None or not ops.runs_kernels(device):
            return
        self.switch.live_on(device)
        if self.stack is None and takes_rows(base):
            self.stack = ValuesStack(base)
        if self.stack is not None:
            self.stack.put(expert, self.switch.slots.of(expert), self._own(delta))

    def delete_adapter(self, adapter_name: str) -> None:
        """As of every wrapped layer; the stack forgets the expert, too."""
        if self.stack is not None:
            self.stack.clear(adapter_name)
        super().delete_adapter(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Shape and dtype as the base's module."""
        if self.stack is not None and is_replayed() and not (self.merged_adapters or args or kwargs):
            index = self.switch.live_on(x.device).index(x.shape[0])
            return run_with_rows(self.base_layer, x, self.stack.pick(self.get_base_layer(), index))
        groups = self.switch.groups(x.shape[0], x.device)
        if self.merged_adapters or all(self.delta_of(expert) is None for expert, _ in groups):
            return self.base_layer(x, *args, **kwargs)
        if groups[0][1] is None:
            return self._module(groups[0][0])(x, *args, **kwargs)
        parts = [(rows, self._module(expert)(x[rows], *args, **kwargs)) for expert, rows in groups]
        out = x.new_empty(x.shape[0], *parts[0][1].shape[1:], dtype=parts[0][1].dtype)
        for rows, part in parts:
            out[rows] = part
        return out

    def _module(self, expert: str | None) -> nn.Module:
        """The base's module seen with the expert's parameters: a shallow copy, so that threads do not swap weights."""
        base = self.base_layer
        delta = self.delta_of(expert)
        if delta is None:
            return base
        view = copy.copy(base)
        # accelerate's hook is a bound ``forward`` of the original module; the copy must use its own.
        view.__dict__.pop("forward", None)
        view._parameters = {**base._parameters, **self._own(delta)}  # type: ignore[dict-item]
        return view

    def _own(self, delta: ValuesDelta) -> dict[str, torch.Tensor]:
        base = self.get_base_layer()._parameters
        return {
            name: value.to(base[name].dtype)  # type: ignore[union-attr]
            for name, value in delta.values.named_parameters(recurse=False)
        }

    def merged_parameters(self, expert: str) -> dict[str, torch.Tensor]:
        """The expert's own parameters."""
        delta = self.stored_delta(expert)
        assert isinstance(delta, ValuesDelta)
        return {name: value.detach().clone() for name, value in self._own(delta).items()}


def wrap(module: nn.Module, kind: str, switch: ExpertSwitch) -> MESwitchLayer:
    """Wrap a base module for a record of ``kind``."""
    if kind == "linear":
        return LinearLayer(module, switch)
    if kind in ("rows", "quantized_rows"):
        return RowsLayer(module, switch) if isinstance(module, nn.Embedding) else HeadLayer(module, switch)
    return ValuesLayer(module, switch)
