"""Writing one expert into the base weights, exactly taking it out again, and leaving a plain model behind."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig

from ..errors import ExpertNotFoundError, UnsupportedOperationError
from .attachment import restore_generation_config, set_vocab_size
from .injection import switch_of, wrapped_layers
from .naming import known_expert
from .switch import ExpertInfo, ExpertSwitch

__all__ = ["describe_expert", "merge_expert", "unload", "unmerge_expert"]


def merge_expert(
    model: Any, adapter_names: list[str] | str | None = None, safe_merge: bool = False, progressbar: bool = False
) -> None:
    """Write W + Δ̂ into the base's modules; the base's own tensors are set aside for :func:`unmerge_expert`.

    Every layer is checked before the first one changes. The expert becomes the active one: it is what the model now
    computes.

    Args:
        model: the model.
        adapter_names: the expert, as a list of one or by itself; the active one if `None`.
        safe_merge: refuse non-finite results.
        progressbar: show one.

    Raises:
        ExpertNotFoundError: not loaded, or none is active.
        UnsupportedOperationError: two experts, another one is merged, or the base is quantised.
        ValueError: ``safe_merge`` and a non-finite weight.
    """
    switch = switch_of(model)
    names = adapter_names if adapter_names is not None else ([] if switch is None else list(switch.active))
    names = [names] if isinstance(names, str) else names
    if switch is None or not names:
        raise ExpertNotFoundError("There is no expert to merge: name one, or make one active with set_expert().")
    experts = [known_expert(name, switch.experts) for name in names]
    if len(experts) != 1 or experts[0] is None:
        raise UnsupportedOperationError(f"Exactly one expert can be merged at a time, got {names}.")
    if switch.merged not in (None, experts[0]):
        raise UnsupportedOperationError(
            f"Expert {switch.merged!r} is merged already; call unmerge_adapter() before merging {experts[0]!r}."
        )
    layers = wrapped_layers(model)
    for layer in tqdm(layers.values(), desc="Checking", disable=not progressbar):
        layer.check_merge(experts[0], safe_merge)
    for layer in tqdm(layers.values(), desc="Merging", disable=not progressbar):
        layer.merge(adapter_names=[experts[0]])
    switch.set_active([experts[0]])
    switch.disabled = False


def unmerge_expert(model: Any) -> None:
    """Put the base's own tensors back, bit for bit."""
    for layer in wrapped_layers(model).values():
        layer.unmerge()


def unload(model: Any, merged: bool) -> Any:
    """Turn a model with experts into a plain transformers model: the base, or the expert that is merged into it.

    Args:
        model: the model; it is changed in place and returned.
        merged: keep the merged expert's weights rather than the base's.
    """
    from ..mixin import downgrade

    switch = switch_of(model)
    assert switch is not None
    if not merged:
        unmerge_expert(model)
    expert = switch.merged
    for path, layer in wrapped_layers(model).items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    set_vocab_size(model, switch.vocab_size(expert))
    restore_generation_config(model)
    if expert is not None:
        _become(model, switch, expert)
    model.__dict__.pop("peft_config", None)
    model.__dict__.pop("_hf_peft_config_loaded", None)
    downgrade(model)
    return model


def describe_expert(config: PreTrainedConfig, info: ExpertInfo) -> None:
    """Let a base's configuration say that it is an expert's: vocabulary, how it is tied, where its answers end.

    Args:
        config: of the base; it is changed in place.
        info: the expert.
    """
    config.tie_word_embeddings = info.tied
    text_config = config.get_text_config()
    text_config.vocab_size = info.vocab_size
    if info.eos_token_id:
        first, *more = info.eos_token_id
        text_config.eos_token_id = [first, *more] if more else first
    if info.pad_token_id is not None:
        text_config.pad_token_id = info.pad_token_id


def _become(model: Any, switch: ExpertSwitch, expert: str) -> None:
    """Let a plain model say that it is the expert whose weights it holds."""
    info = switch.experts[expert]
    describe_expert(model.config, info)
    if not isinstance(model, GenerationMixin):
        return
    path = None if info.files is None else info.files.asset("generation_config.json")
    if path is not None:
        model.generation_config = GenerationConfig.from_pretrained(path.parent)
    elif info.eos_token_id:
        model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id
