"""ME-Switch as a PEFT method: what PEFT and transformers call to attach, fill, save and drop an expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..configuration import MESWITCH, MESwitchExpertConfig
from ..delta_format.location import RepoLocation
from ..delta_format.reader import DeltaFiles, open_delta
from ..delta_format.spec import LEAF_PREFIX, AnyRowsRecord, RowsRecord, tensor_key
from ..delta_format.validate import check_config, check_headers, check_values, tensor_headers
from ..errors import DeltaFormatError, ExpertNameError, MESwitchError, UnsupportedOperationError
from .attachment import attach_expert, remove_expert
from .injection import check_base, plan_injection, switch_of, wrapped_layers
from .joint_linears import link_joint_linears
from .layer import MESwitchLayer
from .layer_kinds import wrap
from .merging import merge_expert, unload
from .naming import module_key
from .rows_layers import HeadLayer, RowsLayer
from .wrapper import follow_switch

__all__ = ["OTHER_METHOD", "MESwitchModel", "check_tensors", "fill_expert", "register"]

#: Error message; the blank is the PEFT method asked for.
OTHER_METHOD = (
    "The model carries ME-Switch experts, and an adapter of type {} cannot be added beside them. Load the base in a "
    "model of its own for that adapter, or merge_and_unload() the expert first."
)


class _ExpertConfigs(dict[str, MESwitchExpertConfig]):
    """The ``peft_config`` of a model with experts, which other PEFT methods must not enter.

    ``get_peft_model(model, LoraConfig(...))`` would wrap LoRA around the deltas, save them under keys that nothing
    reads, and drop them on ``merge_and_unload``.
    """

    def __setitem__(self, name: str, config: Any) -> None:
        if config.peft_type != MESWITCH:
            raise UnsupportedOperationError(OTHER_METHOD.format(config.peft_type.value))
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of any dictionary, item by item."""
        for name, config in dict(*args, **kwargs).items():
            self[name] = config


class MESwitchModel(BaseTuner):
    """The tuner that PEFT creates to inject an expert into a model; see ``PeftModel.base_model``."""

    prefix = LEAF_PREFIX
    tuner_layer_cls = MESwitchLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        configs = getattr(model, "peft_config", None)
        kept = dict(configs or {})
        try:
            super().__init__(model, *args, **kwargs)
        except Exception:
            # PEFT enters the new config before anything is checked, over that of an expert of the same name.
            if configs is not None:
                configs.clear()
                configs.update(kept)
            raise
        # One dictionary for the model and every tuner around it, so that none keeps an expert that is gone.
        if not isinstance(self.peft_config, _ExpertConfigs):
            self.peft_config = _ExpertConfigs(self.peft_config)  # type: ignore[assignment]
        model.peft_config = self.peft_config  # type: ignore[assignment]

    # -- choosing: the switch knows, so PeftModel and the model inside it cannot disagree -----------------------------

    @property
    def active_adapter(self) -> list[str]:  # type: ignore[override]
        """Names of the active adapters; at most one."""
        switch, requested = switch_of(self.model), self.__dict__.get("_requested")
        return requested or [] if switch is None or requested is not None else list(switch.active)

    @active_adapter.setter
    def active_adapter(self, names: str | list[str]) -> None:
        chosen, switch = [names] if isinstance(names, str) else list(names), switch_of(self.model)
        if switch is not None and all(name in switch.experts for name in chosen):
            switch.set_active(chosen)
        else:
            # PEFT's constructor names an expert before it is attached.
            self.__dict__["_requested"] = chosen

    # -- attaching --------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Check the expert against the model, then wrap the layers that it changes.

        Raises:
            MESwitchError: see :func:`~transformers_meswitch.peft_method.injection.plan_injection`; the model is as it
                was before.
        """
        config = self.peft_config[adapter_name]
        try:
            targets = plan_injection(model, config, adapter_name, self.peft_config)
        except Exception:
            del self.peft_config[adapter_name]
            self.__dict__.pop("_requested", None)
            raise
        try:
            attach_expert(model, adapter_name, config)  # type: ignore[arg-type]
            model.peft_config = self.peft_config  # type: ignore[assignment]  # gone with the last expert
            # Not a field of the config: it depends on the model at hand and is never saved.
            config.__dict__["_targets"] = targets
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            _tie_heads(model)
            link_joint_linears(model)
        except Exception:
            remove_expert(model, adapter_name, self.peft_config)
            raise
        finally:
            config.__dict__.pop("_targets", None)
            self.__dict__.pop("_requested", None)

    def _prepare_adapter_config(self, peft_config: MESwitchExpertConfig, model_config: dict) -> MESwitchExpertConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: MESwitchExpertConfig, key: str) -> bool:
        return key in peft_config.__dict__["_targets"]

    def _create_and_replace(
        self,
        peft_config: MESwitchExpertConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        record = peft_config.__dict__["_targets"][current_key]
        layer = target
        if not isinstance(target, MESwitchLayer):
            switch = switch_of(self.model)
            assert switch is not None
            layer = wrap(target, "rows" if record is None else record.kind, switch)
            self._replace_module(parent, target_name, layer, target)
        if record is not None:
            layer.add_delta(adapter_name, record)  # type: ignore[operator, union-attr]

    # PEFT would round step sizes to, or raise them from, half precision.
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        return None

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an expert; the base stays.

        Raises:
            ValueError: no such adapter.
            UnsupportedOperationError: the expert is merged into the base.
        """
        switch = switch_of(self.model)
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if switch is not None:
            switch.check_deletable(adapter_name)
        remove_expert(self.model, adapter_name, self.peft_config)

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write one expert into the base weights; see :func:`~.merging.merge_expert`."""
        merge_expert(self.model, adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            merge_expert(self.model, adapter_names, safe_merge, progressbar)
        return unload(self.model, merge)

    # -- mixed batches: PeftModel.forward and .generate with adapter_names --------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        switch = switch_of(self.model)
        if names is not None and self.training:
            raise UnsupportedOperationError("adapter_names cannot be given in training mode. Call eval() first.")
        with nullcontext() if names is None or switch is None else switch.rows(names, exact=True):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call; PEFT would go past what surrounds its forward (hooks, and the checks of experts)."""
        return self.model(*args, **kwargs)

    # -- state dicts: safe keys in the model, expert-independent keys on disk -----------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MESwitchExpertConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        marker = f".{LEAF_PREFIX}.{module_key(adapter_name)}."
        selected = {key: value for key, value in state_dict.items() if marker in key}
        # PEFT would add all of a wrapped embedding to a save when the vocabulary grew; the rows hold the difference.
        layers = tuple(f"{name}." for name in wrapped_layers(model))
        for key in [k for k in state_dict if k.startswith(layers)]:
            del state_dict[key]
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{LEAF_PREFIX}.{module_key(adapter_name)}.", f".{LEAF_PREFIX}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: MESwitchExpertConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        # PEFT would round what it loads to the base's dtype, so it is left nothing to load.
        outer: Any = model
        inner = outer.get_base_model() if hasattr(model, "get_base_model") else model
        switch = switch_of(inner)
        assert switch is not None
        if switch.pending != adapter_name:
            raise ExpertNameError(
                f"An expert named {adapter_name!r} is already loaded. Delete it first or choose another name."
            )
        try:
            if config.files is not None and not state_dict:  # PEFT knows nothing of shards
                state_dict = open_delta(config.files).tensors()
            check_tensors(config, state_dict)
        except MESwitchError:
            remove_expert(inner, adapter_name, outer.peft_config)
            raise
        fill_expert(inner, adapter_name, config, state_dict, config.files)
        if outer is not inner:
            follow_switch(outer)
        _report_nothing_missing(model)
        return {}


def _report_nothing_missing(model: nn.Module) -> None:
    """Drop experts' keys from what the next ``load_state_dict`` misses: they were filled and checked before."""

    def forget(_: nn.Module, result: Any) -> None:
        handle.remove()
        result.missing_keys[:] = [key for key in result.missing_keys if f".{LEAF_PREFIX}." not in key]

    handle = model.register_load_state_dict_post_hook(forget)


def check_tensors(config: MESwitchExpertConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check a delta's tensors, keyed as on disk, against its config: names, dtypes, shapes and values.

    Raises:
        DeltaFormatError: names the tensor, what was found and what was expected.
    """
    records = check_config(config)
    check_headers(records, tensor_headers(tensors))
    check_values(records, tensors.__getitem__)


def _placed(
    model: nn.Module, expert: str, config: MESwitchExpertConfig, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Parameter name in ``model`` to tensor, for every module of the delta that the model has."""
    layers = wrapped_layers(model)
    prefix = f"{model.base_model_prefix}."  # type: ignore[union-attr]
    placed = {}
    for stored, record in config.records().items():
        local = stored if stored in layers else stored.removeprefix(prefix)
        if local in layers:
            if isinstance(record, AnyRowsRecord):
                _check_added_rows(stored, record, layers[local], tensors)
            for leaf in record.leaves():
                key = f"{local}.{LEAF_PREFIX}.{module_key(expert)}.{leaf}"
                placed[key] = tensors[tensor_key(stored, leaf)]
    return placed


def _check_added_rows(
    name: str, record: AnyRowsRecord, layer: MESwitchLayer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Rows that the base lacks must all be the expert's own; only here is the base's number of rows known.

    Indices are in range and strictly ascending (:func:`check_tensors`), so it is enough that there are as many of them
    as added rows. No row is coded and exact, so none that is coded is beyond the base's either.
    """
    weight: torch.Tensor = layer.get_base_layer().weight  # type: ignore[assignment]
    base_rows = weight.shape[0]
    added = record.num_rows - base_rows
    stored, leaf = (record.rows, "row_index") if isinstance(record, RowsRecord) else (record.exact_rows, "exact_index")
    if added > 0 and (stored < added or int(tensors[tensor_key(name, leaf)][-added]) < base_rows):
        raise DeltaFormatError(
            f"{name} has {record.num_rows} rows in the expert and {base_rows} in the base, but the delta does not "
            f"store all rows from {base_rows} on as the expert's own. The delta repo is damaged; download or compress "
            "it again."
        )


def fill_expert(
    model: Any,
    expert: str,
    config: MESwitchExpertConfig,
    tensors: Mapping[str, torch.Tensor],
    files: DeltaFiles | None = None,
    assets: RepoLocation | None = None,
) -> None:
    """Hand an attached expert its tensors, in their own dtypes, on the devices of the layers they belong to.

    Args:
        model: the transformers model.
        expert: the expert's name.
        config: its ``adapter_config.json``.
        tensors: its tensors (checked, keyed as on disk).
        files: the delta repo they come from, if they do.
        assets: where its tokenizer is, if not in the delta repo.

    Raises:
        BaseMismatchError: the delta was formed against another checkpoint.
        DeltaFormatError: a row that the base lacks is not stored. In either case the expert is gone.
    """
    switch = switch_of(model)
    assert switch is not None
    try:
        check_base(model, config, files)
        for key, tensor in _placed(model, expert, config, tensors).items():
            path, _, leaf = key.partition(f".{LEAF_PREFIX}.{module_key(expert)}.")
            layer = model.get_submodule(path)
            assert isinstance(layer, MESwitchLayer)
            layer.stored_delta(expert).assign(leaf, tensor, next(layer.get_base_layer().parameters()).device)
        for layer in wrapped_layers(model).values():
            layer.settle(expert)
    except Exception:
        remove_expert(model, expert, getattr(model, "peft_config", None))
        raise
    location = assets if files is None else files.location
    switch.experts[expert] = dataclasses.replace(switch.experts[expert], files=files, assets=location)
    switch.pending = None


def _tie_heads(model: nn.Module) -> None:
    """Let the head answer from the embedding's rows where the base ties them."""
    layers = wrapped_layers(model)
    embedding = next((m for m in layers.values() if m is model.get_input_embeddings()), None)  # type: ignore[operator]
    for layer in layers.values():
        if isinstance(layer, HeadLayer) and isinstance(embedding, RowsLayer) and _tied(layer, embedding):
            layer.tie(embedding)


def _tied(head: HeadLayer, embedding: RowsLayer) -> bool:
    return head.get_base_layer().weight is embedding.get_base_layer().weight


def register() -> None:
    """Register the method with PEFT. Idempotent; touches nothing of PEFT but its look-up tables."""
    PEFT_TYPE_TO_CONFIG_MAPPING[MESWITCH] = MESwitchExpertConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[MESWITCH] = MESwitchModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[MESWITCH] = LEAF_PREFIX  # type: ignore[index]
