"""The calls that a transformers model gains with its first expert.

A model with experts keeps its own class as parent (``isinstance(model, LlamaForCausalLM)`` holds) and gains
:class:`MESwitchMixin` in front of it: PEFT-style calls right for deltas, ``set_expert``, ``generate(expert=)``.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftConfig, inject_adapter_in_model
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

from .calls import ExpertCallMixin
from .configuration import MESwitchExpertConfig, MESwitchFamilyConfig
from .continuous_batching import ContinuousExpertMixin
from .delta_format.location import RepoLocation
from .delta_format.reader import DeltaFiles, check_delta, open_delta, resolve_delta
from .delta_format.spec import KEY_PREFIX, LEAF_PREFIX
from .errors import ExpertNotFoundError, UnsupportedOperationError
from .expert_tokenizer import TokenizerMixin
from .peft_method.attachment import adopt_generation_config, remove_expert
from .peft_method.injection import base_download, require_gradients
from .peft_method.merging import merge_expert, unload, unmerge_expert
from .peft_method.naming import check_expert_name, known_expert, module_key
from .peft_method.switch import ExpertSwitch
from .peft_method.tuner import OTHER_METHOD, check_tensors, fill_expert
from .routing.mixin import RoutingMixin

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MESwitchMixin", "downgrade", "upgrade"]

_DOWNLOAD_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")


class MESwitchMixin(ExpertCallMixin, TokenizerMixin, RoutingMixin):
    """Experts on a transformers model: the PEFT adapter calls, ``set_expert`` and saving."""

    _meswitch_switch: ExpertSwitch
    _meswitch_family: MESwitchFamilyConfig | None = None
    #: What the family was loaded from: its own repo, or the base.
    _meswitch_source: str | None = None
    peft_config: dict[str, Any]

    # -- choosing ---------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> list[str]:
        """Names of the loaded experts, in the order of loading."""
        return list(self._meswitch_switch.experts)

    @property
    def active_expert(self) -> str | None:
        """The expert that answers when a call names none; `None` is the base."""
        return self._meswitch_switch.active_expert

    def set_expert(self, expert: str | None) -> None:
        """Let one expert answer from now on, or the base (`None`). Takes microseconds and allocates nothing.

        The same choice as :meth:`set_adapter`, with a name for the base; adapters that were disabled are enabled.

        Raises:
            ExpertNotFoundError: the expert is not loaded.
        """
        switch = self._meswitch_switch
        name = known_expert(expert, switch.experts)
        switch.set_active([] if name is None else [name])
        switch.disabled = False

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """PEFT's name for :meth:`set_expert`. A list may name one expert.

        Raises:
            ExpertNotFoundError: the expert is not loaded, or `None`.
            UnsupportedOperationError: several experts.
        """
        if adapter_name is None:
            raise ExpertNotFoundError("set_adapter(None) names no expert; use set_expert(None) or disable_adapters().")
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self._meswitch_switch.experts:
                known_expert(name if isinstance(name, str) else repr(name), self._meswitch_switch.experts)
                raise ExpertNotFoundError(f"{name!r} is the base; use set_expert(None) or disable_adapters().")
        self._meswitch_switch.set_active(names)

    def active_adapters(self) -> list[str]:
        """The active expert as a list of at most one name, as in PEFT; disabling does not empty it."""
        return list(self._meswitch_switch.active)

    def disable_adapters(self) -> None:
        """Let the base answer until :meth:`enable_adapters` or :meth:`set_expert`; a merged expert is unmerged."""
        unmerge_expert(self)
        self._meswitch_switch.disabled = True

    def enable_adapters(self) -> None:
        """Undo :meth:`disable_adapters`."""
        self._meswitch_switch.disabled = False

    # -- loading and deleting -----------------------------------------------------------------------------------------

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: MESwitchExpertConfig | dict[str, Any] | None = None,
        adapter_state_dict: dict[str, torch.Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        hotswap: bool | Literal["auto"] = "auto",
        local_files_only: bool = False,
        adapter_kwargs: dict[str, Any] | None = None,
        load_config: Any = None,
        **kwargs: Any,
    ) -> LoadStateDictInfo:
        """Load a delta repo as an expert and make it active, with transformers' arguments and semantics.

        Args:
            peft_model_id: Hub id or folder of the delta repo.
            adapter_name: the expert's name; ``"default"`` if not given.
            peft_config: config of an expert handed over as tensors, instead of a repo.
            adapter_state_dict: its tensors, keyed as on disk or as :meth:`get_adapter_state_dict` returns them.
            low_cpu_mem_usage: accepted, and without effect.
            is_trainable: refused when true.
            hotswap: refused when true.
            local_files_only: do not ask the Hub.
            adapter_kwargs: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ...
            load_config: transformers' own, from which download arguments are taken.
            **kwargs: the same as ``adapter_kwargs``; fields of transformers' ``LoadStateDictConfig`` have no effect.

        Raises:
            TypeError: an argument that transformers does not know either.
            MESwitchError: the delta is malformed, belongs to another base, or its name is taken; the model is as it
                was before.
        """
        if hotswap is True:
            raise UnsupportedOperationError(
                "hotswap=True is not supported: experts differ in shape. Load the new expert under another name, "
                "set_expert() to it, and delete_adapter() the old one."
            )
        known = {*_DOWNLOAD_ARGUMENTS, *(field.name for field in dataclasses.fields(LoadStateDictConfig))}
        unknown = next((key for key in kwargs if key not in known), None)
        if unknown is not None:
            raise TypeError(f"load_adapter() got an unexpected keyword argument {unknown!r}")
        name = "default" if adapter_name is None else adapter_name
        download = {**getattr(load_config, "download_kwargs", {}), **(adapter_kwargs or {}), **kwargs}
        download = {key: download[key] for key in _DOWNLOAD_ARGUMENTS if download.get(key) is not None}
        if local_files_only:
            download["local_files_only"] = True
        if peft_model_id is not None:
            delta = open_delta(resolve_delta(str(peft_model_id), **download))
            check_delta(delta)
            delta.config.inference_mode = not is_trainable
            self.attach_delta(name, delta.config, delta.tensors(), delta.files)
        elif peft_config is not None and adapter_state_dict is not None:
            config = peft_config if isinstance(peft_config, PeftConfig) else MESwitchExpertConfig(**peft_config)
            if not isinstance(config, MESwitchExpertConfig):
                raise UnsupportedOperationError(OTHER_METHOD.format(getattr(config.peft_type, "value", None)))
            tensors = {f"{KEY_PREFIX}{key.removeprefix(KEY_PREFIX)}": t for key, t in adapter_state_dict.items()}
            check_tensors(config, tensors)
            config.inference_mode = not is_trainable
            self.attach_delta(name, config, tensors)
        else:
            raise ValueError("load_adapter needs a peft_model_id, or a peft_config and an adapter_state_dict.")
        return _loading_info()

    def attach_delta(
        self,
        name: str,
        config: MESwitchExpertConfig,
        tensors: Mapping[str, torch.Tensor],
        files: DeltaFiles | None = None,
        assets: RepoLocation | None = None,
    ) -> None:
        """Attach an expert whose tensors were checked already, and make it active.

        Args:
            name: the expert's name.
            config: its ``adapter_config.json``.
            tensors: its tensors, keyed as on disk.
            files: the delta repo they come from, if they do.
            assets: where its tokenizer is, if not in the delta repo.

        Raises:
            MESwitchError: see :func:`~transformers_meswitch.peft_method.injection.plan_injection`.
        """
        check_expert_name(name, self._meswitch_switch.experts, ())
        with warnings.catch_warnings():
            # PEFT warns whenever a model gets a second adapter, which is what a family is for.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, self, name)  # type: ignore[arg-type]
        fill_expert(self, name, config, tensors, files, assets)
        self._hf_peft_config_loaded = True
        self.eval()  # type: ignore[attr-defined]

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> tuple[Any, Any]:
        """Fill the expert that transformers' own ``load_adapter`` is loading; see ``docs/concepts.md``.

        The first expert arrives through transformers' code, which injects it and then calls this hook for its weights.
        """
        name = model._meswitch_switch.pending
        if name is None:
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        config = model.peft_config[name]
        try:
            if state_dict:
                tensors = {f"{KEY_PREFIX}{key.removeprefix(KEY_PREFIX)}": t for key, t in state_dict.items()}
                check_tensors(config, tensors)
                fill_expert(model, name, config, tensors)
            else:
                download = {k: v for k, v in load_config.download_kwargs.items() if k in _DOWNLOAD_ARGUMENTS and v}
                delta = open_delta(resolve_delta(str(load_config.pretrained_model_name_or_path), **download))
                check_delta(delta)
                # Only from_pretrained(delta) passes the config that it loaded the base with; a caller's own
                # load_adapter has no dtype to pass on, and keeps the generation defaults that the caller set.
                whole = load_config.dtype is not None
                if whole:
                    model._meswitch_switch.base_download = base_download(model, download)
                fill_expert(model, name, config, delta.tensors(), delta.files)
                if whole:
                    adopt_generation_config(model, name, delta.asset("generation_config.json"))
        except Exception:
            remove_expert(model, name, getattr(model, "peft_config", None))
            raise
        return _loading_info(), None

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Refused: an expert is loaded, not trained in place.

        Raises:
            UnsupportedOperationError: always.
        """
        method = getattr(getattr(adapter_config, "peft_type", None), "value", type(adapter_config).__name__)
        raise UnsupportedOperationError(OTHER_METHOD.format(method))

    def enable_peft_hotswap(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            UnsupportedOperationError: always.
        """
        raise UnsupportedOperationError("Hot-swapping is not supported for deltas; load the expert under a new name.")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the experts' rows were formed against the base's vocabulary.

        Raises:
            UnsupportedOperationError: always.
        """
        raise UnsupportedOperationError(
            "The embeddings of a model with experts cannot be resized: each expert brings its own vocabulary. "
            "merge_and_unload() the expert first, or resize the fine-tune and compress it again."
        )

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the base was tied when it was loaded, and each expert's head follows its own embedding."""

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Drop experts and their memory. If the active one goes, the alphabetically first remaining becomes active.

        Raises:
            ExpertNotFoundError: a name is not loaded; nothing is deleted.
            UnsupportedOperationError: the expert is merged into the base.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        switch = self._meswitch_switch
        for name in names:
            if name not in switch.experts:
                known_expert(name, switch.experts)
                raise ExpertNotFoundError(f"{name!r} is the base and cannot be deleted.")
            switch.check_deletable(name)
        for name in names:
            remove_expert(self, name, self.peft_config)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As of any module, for the base's parameters; deltas cannot be trained."""
        return require_gradients(self, requires_grad)

    # -- tensors ----------------------------------------------------------------------------------------------------

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """An expert's tensors, keyed by module and leaf as in a delta repo but without PEFT's prefix.

        Args:
            adapter_name: the expert; the active one if `None`.
            state_dict: the model's state dict, where it had to be gathered by other means.

        Raises:
            ExpertNotFoundError: not loaded, or none is active.
            UnsupportedOperationError: this model lacks modules that the expert changes (``AutoModel`` has no head).
        """
        # What is active, not what answers: disabling does not change which adapter is saved.
        chosen = adapter_name if adapter_name is not None else self._meswitch_switch.chosen_expert
        name = known_expert(chosen, self.experts)
        if name is None:
            raise ExpertNotFoundError("No expert is active; name one, or call set_expert() first.")
        whole = self.state_dict() if state_dict is None else state_dict  # type: ignore[attr-defined]
        prefix = f"{self.base_model_prefix}."  # type: ignore[attr-defined]
        tensors = {}
        for stored, record in self.peft_config[name].records().items():
            for leaf in record.leaves():
                tail = f".{LEAF_PREFIX}.{module_key(name)}.{leaf}"
                tensor = whole.get(stored + tail, whole.get(stored.removeprefix(prefix) + tail))
                if tensor is None:
                    raise UnsupportedOperationError(
                        f"{type(self).__name__} has no {stored!r}, which expert {name!r} changes, so its delta cannot "
                        "be saved from here. Load it with AutoModelForCausalLM."
                    )
                tensors[f"{stored}.{LEAF_PREFIX}.{leaf}"] = tensor
        return tensors

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | str | None = None, safe_merge: bool = False) -> None:
        """Write one expert into the base weights, for speed; see :func:`~.peft_method.merging.merge_expert`."""
        merge_expert(self, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, bit for bit."""
        unmerge_expert(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | str | None = None
    ) -> PreTrainedModel:
        """Merge one expert and return the plain model; all other experts are gone."""
        merge_expert(self, adapter_names, safe_merge, progressbar)
        return unload(self, merged=True)

    # -- saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the active expert as a delta repo, or a family as a family repo; arguments as in transformers.

        Nothing half-written is left behind if it is interrupted: the folder holds the old repo, the new one, or none
        that loads.
        """
        from .saving import save_pretrained

        save_pretrained(self, save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push the active expert's delta repo, or the family repo; arguments as in transformers.

        The model card is merged with the one on the Hub, never overwritten.
        """
        from .saving import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)


def _loading_info() -> LoadStateDictInfo:
    fields: dict[str, Any] = {
        f.name: [] if f.name == "error_msgs" else set() for f in dataclasses.fields(LoadStateDictInfo)
    }
    return LoadStateDictInfo(**{**fields, "conversion_errors": {}})


class _OfBaseClass:
    """What of a model with experts is its class's rather than its own: making another, and being read back."""

    _meswitch_base_class: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain model: experts are loaded into a model, not made with it."""
        return cls._meswitch_base_class(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of the base's class."""
        return cls._meswitch_base_class.from_pretrained(*args, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._meswitch_base_class._from_config(*args, **kwargs)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, and copied, by way of the base's class: this one is made when it is needed."""
        return _empty_model, (self._meswitch_base_class,), self.__dict__


def _empty_model(base: type) -> Any:
    return object.__new__(_expert_class(base))


@functools.cache
def _expert_class(base: type) -> type:
    mixins = (MESwitchMixin, ContinuousExpertMixin) if issubclass(base, GenerationMixin) else (MESwitchMixin,)
    # The base's own name: transformers compares class names with lists of known models.
    return type(base.__name__, (_OfBaseClass, *mixins, base), {"__module__": __name__, "_meswitch_base_class": base})


def upgrade(model: PreTrainedModel) -> None:
    """Give a model the calls of :class:`MESwitchMixin`, by way of a subclass of its own class. Idempotent."""
    if not isinstance(model, MESwitchMixin):
        model.__class__ = _expert_class(type(model))  # type: ignore[arg-type]


def downgrade(model: PreTrainedModel) -> None:
    """Undo :func:`upgrade`, and forget the switch."""
    if isinstance(model, MESwitchMixin):
        model.__class__ = type(model)._meswitch_base_class  # type: ignore[attr-defined]
    for name in ("_meswitch_switch", "_meswitch_router"):
        model.__dict__.pop(name, None)
