"""Making an expert known to a model, and taking every trace of one away again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from ..configuration import MESwitchExpertConfig
from .injection import base_vocab_size, expert_info, switch_of, wrapped_layers
from .joint_linears import link_joint_linears
from .rows_layers import HeadLayer
from .switch import ExpertSwitch

__all__ = [
    "adopt_generation_config",
    "attach_expert",
    "ensure_switch",
    "remove_expert",
    "restore_generation_config",
    "set_vocab_capacity",
    "set_vocab_size",
]


def ensure_switch(model: Any) -> ExpertSwitch:
    """Give a model its expert switch and the calls that take ``expert=``, if it has none."""
    from ..mixin import upgrade

    switch = switch_of(model)
    if switch is None:
        generation_config = getattr(model, "generation_config", None)
        eos = getattr(generation_config, "eos_token_id", None)
        eos = model.config.get_text_config().eos_token_id if eos is None else eos
        switch = ExpertSwitch(
            base_vocab_size=base_vocab_size(model),
            base_eos_token_id=() if eos is None else tuple([eos] if isinstance(eos, int) else eos),
            trainable=[parameter for parameter in model.parameters() if parameter.requires_grad],
        )
        model.__dict__["_meswitch_switch"] = switch
    upgrade(model)
    return switch


def attach_expert(model: Any, name: str, config: MESwitchExpertConfig) -> None:
    """Enter an expert in the model's switch; its layers and tensors come after."""
    switch = ensure_switch(model)
    switch.enter(name, expert_info(config, model))
    switch.pending = name
    set_vocab_capacity(model)


def set_vocab_capacity(model: Any) -> None:
    """Keep ``config.vocab_size`` equal to the width of the logits, which loss functions and beam search rely on."""
    switch = switch_of(model)
    if switch is not None:
        set_vocab_size(model, switch.vocab_capacity)


def set_vocab_size(model: Any, size: int) -> None:
    """State a model's vocabulary in its config, and where its class keeps a copy (Gemma's loss reads its own)."""
    model.config.get_text_config().vocab_size = size
    for owner in {model, model.base_model}:
        if "vocab_size" in owner.__dict__:
            owner.vocab_size = size


def remove_expert(model: Any, name: str, peft_configs: dict[str, Any] | None) -> None:
    """Take an expert off a model, and every trace of the method once the last one is gone.

    Args:
        model: the transformers model.
        name: the expert.
        peft_configs: the model's ``peft_config``, from which the expert's is dropped.
    """
    from ..mixin import downgrade

    switch = switch_of(model)
    if switch is None:
        return
    for layer in wrapped_layers(model).values():
        layer.delete_adapter(name)
    switch.forget(name)
    unwrap_idle_layers(model)
    set_vocab_capacity(model)
    if peft_configs is not None:
        peft_configs.pop(name, None)
    if switch.pending == name:
        switch.pending = None
    if not switch.experts:
        restore_generation_config(model)
        for parameter in switch.trainable:
            parameter.requires_grad_(True)
        if not peft_configs:
            model.__dict__.pop("peft_config", None)
            model.__dict__.pop("_hf_peft_config_loaded", None)
        if not switch.keep:
            downgrade(model)


def adopt_generation_config(model: Any, expert: str, path: Path | None) -> None:
    """Take over the generation defaults of the expert that a model was loaded from.

    Args:
        model: the transformers model; one that does not generate is left alone.
        expert: the expert's name.
        path: the expert's ``generation_config.json``, if it has one.
    """
    switch = switch_of(model)
    if switch is not None and path is not None and isinstance(model, GenerationMixin):
        switch.base_generation_config = model.generation_config
        switch.generation_config_of = expert
        model.generation_config = GenerationConfig.from_pretrained(path.parent)


def restore_generation_config(model: Any) -> None:
    """Undo :func:`adopt_generation_config`."""
    switch = switch_of(model)
    if switch is not None and switch.base_generation_config is not None:
        model.generation_config = switch.base_generation_config
        switch.base_generation_config = switch.generation_config_of = None


def unwrap_idle_layers(model: Any) -> None:
    """Give back the base's own modules where no expert has a delta.

    Compiled code and graphs may hold the tables of layers that had one, and find the next expert there, so these stay
    as long as the model has experts, or keeps its calls without.
    """
    for path, layer in wrapped_layers(model).items():
        used = layer.switch.experts and (isinstance(layer, HeadLayer) or layer.has_table)
        kept = layer.switch.keep and layer.has_table
        if not (layer.meswitch_delta or used or kept):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    link_joint_linears(model)
