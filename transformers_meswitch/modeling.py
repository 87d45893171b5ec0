"""``MESwitchModelForCausalLM``: one base and its experts, loaded in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from .compression.expert_config import portable_name
from .configuration import MESwitchFamilyConfig
from .errors import UnsupportedModelError, UnsupportedOperationError
from .mixin import MESwitchMixin
from .peft_method.attachment import ensure_switch
from .peft_method.naming import check_expert_name

__all__ = ["MESwitchModel", "MESwitchModelForCausalLM"]

_NO_ROUTER = (
    "This release has no routers; pass router=None to a base and its experts, and name the expert of each call."
)
_IS_DELTA = (
    "{!r} is itself a delta repo, not a base. Load it with AutoModelForCausalLM.from_pretrained, or name its base "
    "here and the delta under experts=."
)
_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download")


class _Family(PreTrainedModel):
    """Loads a base natively, then its experts. What is returned is the base's own class with experts, not this one."""

    config_class = MESwitchFamilyConfig
    _auto_class_for_base: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedOperationError(
            f"{type(self).__name__} is a loader, not a module: use {type(self).__name__}.from_pretrained(base, "
            "experts={name: delta_repo})."
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        experts: Mapping[str, str | Mapping[str, Any]] | None = None,
        router: Any = None,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a base with experts, or a family repo.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the base, or of a family repo.
            *model_args: passed to ``AutoModelForCausalLM.from_pretrained`` of the base.
            experts: name to delta repo (an id, a folder, or ``{"repo": ..., "revision": ..., "subfolder": ...}``).
                With a family repo, these replace the family's own.
            router: reserved; only `None` is accepted.
            config: the family's config, as the Auto classes pass it.
            **kwargs: anything that ``AutoModelForCausalLM.from_pretrained`` takes (``dtype``, ``device_map``,
                ``quantization_config``, ``revision``, ``token``, ...).

        Returns:
            The base's model with experts attached. The family's default expert is active, else none is: the base
            answers until ``set_expert`` or ``generate(expert=)``.

        Raises:
            MESwitchError: an expert is malformed, of another base, or badly named.
        """
        if router is not None:
            raise UnsupportedOperationError(_NO_ROUTER)
        for private in ("_from_auto", "_from_pipeline", "adapter_kwargs"):
            kwargs.pop(private, None)
        source = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
        kwargs = {**_consumed_arguments(config), **kwargs}
        family, base, base_arguments = cls._resolve(source, config, hub, kwargs)
        if family.router is not None:
            raise UnsupportedOperationError(f"The family {source!r} has a router. {_NO_ROUTER}")
        references = dict(family.experts or {}) if experts is None else _references(experts)
        for name in references:
            check_expert_name(name, (), ())
        model = cls._auto_class_for_base.from_pretrained(base, *model_args, **{**kwargs, **base_arguments})
        if isinstance(model, MESwitchMixin):
            raise UnsupportedModelError(_IS_DELTA.format(source))
        switch = ensure_switch(model)
        switch.keep = True
        switch.base_download = {k: v for k, v in {**hub, **base_arguments}.items() if v is not None}
        model._meswitch_family = family
        model._meswitch_source = source
        if base != source or base_arguments.get("subfolder"):
            _adopt_generation_config(model, source, {**hub, **_revision(kwargs.get("revision"))})
        for name, reference in tqdm(references.items(), desc="Loading experts", disable=len(references) < 2):
            repo, download = _located(source, reference, hub, kwargs.get("revision"))
            model.load_adapter(repo, adapter_name=name, adapter_kwargs=download)
        model.set_expert(family.default_expert if experts is None else None)
        return model

    @classmethod
    def _resolve(
        cls, source: str, config: Any, hub: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> tuple[MESwitchFamilyConfig, str, dict[str, Any]]:
        """The family's config, its base, and arguments that replace the caller's when loading the base."""
        if not isinstance(config, MESwitchFamilyConfig):
            where = {**hub, **_revision(kwargs.get("revision"))}
            try:
                found = AutoConfig.from_pretrained(source, trust_remote_code=kwargs.get("trust_remote_code"), **where)
            except (OSError, ValueError) as error:
                if find_adapter_config_file(source, **where) is None:
                    raise
                raise UnsupportedModelError(_IS_DELTA.format(source)) from error
            if not isinstance(found, MESwitchFamilyConfig):
                arguments = {} if config is None else {"config": config}
                return MESwitchFamilyConfig(portable_name(source), kwargs.get("revision")), source, arguments
            config = found
        base = config.base_model_name_or_path
        if not base:
            raise UnsupportedModelError(f"The family {source!r} names no base (base_model_name_or_path is {base!r}).")
        if base.startswith("./"):
            if Path(source).is_dir():
                return config, str(Path(source) / base[2:]), {"revision": None}
            return config, source, {"subfolder": base[2:]}
        return config, base, {"revision": config.base_revision}

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        return None


class MESwitchModelForCausalLM(_Family):
    """Family loader for generation.

    >>> from transformers_meswitch import MESwitchModelForCausalLM
    >>> model = MESwitchModelForCausalLM.from_pretrained("base", experts={"math": "math-delta"})  # doctest: +SKIP
    >>> model.generate(**inputs, expert="math")  # doctest: +SKIP
    """

    _auto_class_for_base = AutoModelForCausalLM


class MESwitchModel(_Family):
    """Family loader for hidden states (``AutoModel``): the same experts, without the output head."""

    _auto_class_for_base = AutoModel


def _consumed_arguments(config: Any) -> dict[str, Any]:
    """Arguments meant for the base that the Auto classes have already entered in the family's config."""
    if not isinstance(config, MESwitchFamilyConfig):
        return {}
    names = ("attn_implementation", "output_attentions", "output_hidden_states")
    found = {name: getattr(config, f"_{name}" if name == "attn_implementation" else name, None) for name in names}
    return {name: value for name, value in found.items() if value}


def _adopt_generation_config(model: Any, family: str, download: Mapping[str, Any]) -> None:
    """A family's generation defaults are its own (they may name an expert), if it has some."""
    if isinstance(model, GenerationMixin):
        # A family without the file keeps its base's.
        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(family, **download)


def _references(experts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"repo": ref} if not isinstance(ref, Mapping) else dict(ref) for name, ref in experts.items()}


def _revision(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def _located(
    family: str, reference: Mapping[str, Any], hub: Mapping[str, Any], revision: str | None
) -> tuple[str, dict[str, Any]]:
    """Repo and download arguments of an expert; ``./path`` is inside the family repo, at the family's revision."""
    repo, download = str(reference["repo"]), {**hub, **_revision(reference.get("revision"))}
    if reference.get("subfolder"):
        download["subfolder"] = reference["subfolder"]
    if repo.startswith("./") and reference.get("revision") is None:
        if Path(family).is_dir():
            inside = Path(family) / repo[2:]
            # A caller's own relative path is relative to where the program runs, not to the base.
            return (str(inside) if inside.is_dir() else repo), download
        return family, {**hub, **_revision(revision), "subfolder": repo[2:]}
    return repo, download
