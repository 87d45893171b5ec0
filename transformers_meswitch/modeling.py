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
from .configuration import MESwitchFamilyConfig, expert_references, reference_in_family
from .delta_format.location import RepoLocation
from .errors import MESwitchError, RouterError, UnsupportedModelError, UnsupportedOperationError
from .mixin import MESwitchMixin
from .peft_method.attachment import ensure_switch
from .peft_method.naming import check_expert_name, known_expert
from .routing.loading import ROUTER_TYPES, load_router

__all__ = ["MESwitchModel", "MESwitchModelForCausalLM"]

_IS_DELTA = (
    "{!r} is itself a delta repo, not a base. Name its base here and the delta under experts=, or its family alone if "
    "it is inside one; or load it with AutoModelForCausalLM.from_pretrained."
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
                A relative path is relative to where the program runs. With a family repo, these replace the family's
                own, and none is active.
            router: what picks the expert with ``expert="auto"``: a router, or Hub id or folder of a repo that has one.
                `None` is the family's own, if the experts are the family's too; `False` is none, so that a family
                whose router is damaged can be loaded and given another.
            config: the family's config, as the Auto classes pass it, or one to load the base with.
            **kwargs: anything that ``AutoModelForCausalLM.from_pretrained`` takes (``dtype``, ``device_map``,
                ``quantization_config``, ``revision``, ``subfolder``, ``token``, ...); with a family repo, ``revision``
                and ``subfolder`` are the family's.

        Returns:
            The base's model with experts attached. The family's default expert is active, else none is: the base
            answers until ``set_expert`` or ``generate(expert=)``. With ``output_loading_info=True``, a pair of it and
            what transformers tells of the base's loading.

        Raises:
            MESwitchError: an expert is malformed, of another base, or badly named.
            RouterError: the router is missing, malformed, or of another base.
        """
        for private in ("_from_auto", "_from_pipeline", "adapter_kwargs"):
            kwargs.pop(private, None)
        source = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
        kwargs = {**_consumed_arguments(config), **kwargs}
        family, base, base_arguments = cls._resolve(source, config, hub, kwargs)
        where = {key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key)}
        if router is None and experts is None and family.router is not None:
            router = load_router(RepoLocation(source, **{**hub, **where}, error=RouterError))
        elif isinstance(router, str | Path):
            router = load_router(RepoLocation(str(router), **hub, error=RouterError))
        elif router is False:
            router = None
        elif router is not None and not isinstance(router, tuple(ROUTER_TYPES.values())):
            raise RouterError(
                f"router is {router!r:.60}, expected a router such as HeadRouter, or the "
                "Hub id or folder of a repo that has one."
            )
        if experts is None:
            inside = family.experts or {}
            references = {name: reference_in_family(source, reference, where) for name, reference in inside.items()}
        else:
            references = expert_references(experts)
        default = known_expert(family.default_expert, references) if experts is None else None
        for name in references:
            check_expert_name(name, (), ())
        base_arguments |= _pinned(base, {**hub, **where, **base_arguments}, kwargs.get("gguf_file"))
        if config is not None and not isinstance(config, MESwitchFamilyConfig):
            kwargs["config"] = config
        arguments = {**kwargs, **base_arguments}
        # transformers looks for an adapter in the base's repo, on the Hub even where only local files are to be used.
        lookup = {key: arguments[key] for key in ("cache_dir", "local_files_only") if arguments.get(key) is not None}
        if lookup:
            arguments["adapter_kwargs"] = lookup
        loaded = cls._auto_class_for_base.from_pretrained(base, *model_args, **arguments)
        # With output_loading_info=True, what was missing or unexpected in the base's checkpoint comes along.
        model, info = loaded if isinstance(loaded, tuple) else (loaded, None)
        if isinstance(model, MESwitchMixin):
            raise UnsupportedModelError(_IS_DELTA.format(source))
        switch = ensure_switch(model)
        switch.keep = True
        switch.base_download = {k: v for k, v in {**hub, **where, **base_arguments}.items() if v not in (None, "")}
        model._meswitch_family = family
        local = Path(source).is_dir() and where.get("subfolder")
        model._meswitch_source = str(Path(source) / where["subfolder"]) if local else source
        if base != source or base_arguments.get("subfolder"):
            _adopt_generation_config(model, source, {**hub, **where})
        for name, reference in tqdm(references.items(), desc="Loading experts", disable=len(references) < 2):
            download = {key: value for key, value in reference.items() if key != "repo" and value is not None}
            model.load_adapter(reference["repo"], adapter_name=name, adapter_kwargs={**hub, **download})
        model.set_expert(default)
        model.set_router(router)
        return model if info is None else (model, info)

    @classmethod
    def _resolve(
        cls, source: str, config: Any, hub: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> tuple[MESwitchFamilyConfig, str, dict[str, Any]]:
        """The family's config, its base, and arguments that replace the caller's when loading the base."""
        if not isinstance(config, MESwitchFamilyConfig):
            where = {**hub, **{key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key)}}
            try:
                found = AutoConfig.from_pretrained(source, trust_remote_code=kwargs.get("trust_remote_code"), **where)
            except MESwitchError:
                raise
            except (OSError, ValueError) as error:
                if kwargs.get("gguf_file"):  # a GGUF file is its own config
                    return _family_of(source, kwargs), source, {}
                if find_adapter_config_file(source, **where) is None:
                    raise
                raise UnsupportedModelError(_IS_DELTA.format(source)) from error
            if not isinstance(found, MESwitchFamilyConfig):
                return _family_of(source, kwargs), source, {}
            config = found
        base = config.base_model_name_or_path
        if not base:
            raise UnsupportedModelError(f"The family {source!r} names no base (base_model_name_or_path is {base!r}).")
        if base.startswith("./"):
            inside = "/".join(filter(None, (kwargs.get("subfolder"), base[2:].rstrip("/"), config.base_subfolder)))
            if Path(source).is_dir():
                return config, str(Path(source) / inside), {"revision": None, "subfolder": ""}
            return config, source, {"subfolder": inside}
        return config, base, {"revision": config.base_revision, "subfolder": config.base_subfolder or ""}

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing: importing the package registers the class.

        transformers' method marks a class whose source is to be copied into the repos it is saved to; a family repo
        is read by this package, and carries one line that imports it.
        """


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


def _family_of(base: str, arguments: Mapping[str, Any]) -> MESwitchFamilyConfig:
    """The family of a plain base; a subfolder of a local folder is a folder itself."""
    subfolder = arguments.get("subfolder") or None
    if subfolder and Path(base).is_dir():
        return MESwitchFamilyConfig(portable_name(Path(base) / subfolder))
    return MESwitchFamilyConfig(portable_name(base), arguments.get("revision"), base_subfolder=subfolder)


def _pinned(base: str, download: Mapping[str, Any], gguf_file: str | None) -> dict[str, Any]:
    """The commit of a base on the Hub, so that a family which is saved later names the very files that were loaded."""
    location = RepoLocation(base, **{key: value for key, value in download.items() if value})
    # What cannot be reached is for transformers to report.
    with contextlib.suppress(MESwitchError):
        found = None if location.is_local else location.find(gguf_file or "config.json")
        return {} if found is None else {"revision": location.pinned(found).revision}
    return {}
