"""Whether an expert computes what its base does, weights aside: a delta carries weights, and the base the rest.

transformers builds a model from ``config.json``, with class defaults for what is not in it. Two configurations are
compared as their class understands them: of the keys that it declares, those that change what the model computes at
inference must have the same meaning. All others may differ: a fine-tune has its own vocabulary, dropout and history.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..delta_format.location import RepoLocation
from ..errors import CompressionError
from .sources import Source

__all__ = ["check_same_computation", "differences"]

#: The delta carries these: the embedding's rows, tying and the tokens that end an answer.
_CARRIED = {"vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"}
_CARRIED |= {"cls_token_id", "mask_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"}
#: What the checkpoint says of itself, what is returned beside the logits, and ways to the same numbers.
_ASIDE = {"architectures", "transformers_version", "dtype", "id2label", "label2id", "problem_type", "return_dict"}
_ASIDE |= {"output_hidden_states", "output_attentions", "output_router_logits", "use_cache", "num_logits_to_keep"}
_ASIDE |= {"chunk_size_feed_forward", "pretraining_tp", "slow_but_exact", "use_mamba_kernels", "use_mambapy"}
_ASIDE |= {"use_associative_scan", "use_mem_eff_path", "init_device", "init_std", "embed_init_std", "layerdrop"}
#: What is in the weights' shapes (where `None` may stand for the default), or in the rotary embeddings' parameters.
_SHAPES = {"n_inner", "n_ctx", "original_max_position_embeddings"}
#: What only training reads, and the heads of other tasks.
_TRAINING = re.compile(r"dropout|_pdrop$|_layerdrop$|initializer|jitter_noise$|loss_coef|^summary_|^classifier_")
#: How other keys came about; what they gave is in ``layer_types``.
_GIVE_LAYER_TYPES = {"use_sliding_window", "max_window_layers", "sliding_window_pattern"}
#: Names of one function. The approximations of GELU by tanh differ in rounding alone.
_SAME = {"swish": "silu", "gelu_python": "gelu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
#: Parameters of the rotary embeddings that scale them to longer contexts; the plain ones read none.
_ROPE_PLAIN = {"rope_type", "rope_theta", "partial_rotary_factor"}
_ROPE_SCALING = re.compile(r"factor$|^(original_)?max_position_embeddings$|^beta_|^mscale|^truncate$|^finetuned$")
#: Rotary embeddings that do not depend on the longest context that the configuration states.
_ROPE_OF_ANY_LENGTH = ("default", "linear", "llama3", "proportional", "axial")


def check_same_computation(base: Source, expert: RepoLocation, config: PreTrainedConfig) -> None:
    """Refuse an expert that is another model than its base plus other weights, before any weights are read.

    Args:
        base: the base's files.
        expert: the expert's repo, for the message.
        config: the expert's configuration.

    Raises:
        CompressionError: another model type; or naming each key that differs, with both values.
    """
    ours, theirs = config, base.config
    if type(ours) is not type(theirs):  # transformers may keep only the text model of a larger one
        ours, theirs = ours.get_text_config(), theirs.get_text_config()
    if ours.model_type != theirs.model_type:
        raise CompressionError(
            f"{expert} is of model_type {ours.model_type!r} and {base.location} of {theirs.model_type!r}. "
            "The expert is of another architecture; a delta needs a fine-tune of this base."
        )
    found = [
        f"{key} is {_shown(own)} in the expert but {_shown(other)} in the base"
        for key, own, other in differences(ours, theirs)
    ]
    if found:
        raise CompressionError(
            f"{expert} and {base.location} differ in more than weights: {'; '.join(found)}. A delta holds weights "
            "only and runs with the base's config.json, so it would not compute what the expert does. Give the base "
            "that the expert was trained from; if the config.json of one of the two is wrong, correct it there."
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    """Keys that make two configurations of one class compute different things: name, our value, their value.

    Keys of a nested configuration or of the rotary embeddings are dotted; a key that one has not is `None` there.

    >>> from transformers import LlamaConfig
    >>> list(differences(LlamaConfig(rms_norm_eps=1e-5, vocab_size=8), LlamaConfig(attention_dropout=0.1)))
    [('rms_norm_eps', 1e-05, 1e-06)]
    """
    left, right = (dict(_flat(_computation(config))) for config in (ours, theirs))
    for key in [*left, *(key for key in right if key not in left)]:
        if left.get(key) != right.get(key):
            yield key, left.get(key), right.get(key)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _computation(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says of the computation at inference, each meaning in one form."""
    length = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    layer_types = getattr(config, "layer_types", None)
    left_out = {"rope_parameters", "max_position_embeddings", length} | _SHAPES
    if layer_types:
        left_out |= _GIVE_LAYER_TYPES
        if not any("sliding" in kind for kind in layer_types):
            left_out |= {"sliding_window"}
    values = {
        key: _value(config, key)
        for key in _declared(config)
        if key not in left_out | _CARRIED | _ASIDE and not _TRAINING.search(key) and hasattr(config, key)
    }
    rope = _rope(config)
    values["rope_parameters"] = rope
    # Tables of learnt positions are parameters: a delta carries their rows, however many.
    if any(_reads_length(entry) for entry in ([rope] if "rope_type" in rope else rope.values())):
        values[length] = getattr(config, length, None)
    return values


def _declared(config: PreTrainedConfig) -> list[str]:
    """Keys that a configuration's class knows; the modelling code never reads the others."""
    arguments = inspect.signature(type(config).__init__).parameters
    names = [*(field.name for field in dataclasses.fields(config)), *arguments]
    return [name for name in dict.fromkeys(names) if name not in ("self", "args", "kwargs")]


def _value(config: PreTrainedConfig, key: str) -> Any:
    value = getattr(config, key)
    if isinstance(value, PreTrainedConfig):
        return _computation(value)
    if isinstance(value, tuple):
        return list(value)
    if value is None and key == "num_key_value_heads":
        return getattr(config, "num_attention_heads", None)
    if value is None and key == "head_dim" and getattr(config, "num_attention_heads", None):
        return config.hidden_size // config.num_attention_heads
    return _SAME.get(value, value) if isinstance(value, str) else value


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Parameters of the rotary embeddings, or those of each layer type; empty where there are none."""
    stated = getattr(config, "rope_parameters", None) or {}
    nested = {key: value for key, value in stated.items() if isinstance(value, Mapping)}
    if nested:
        return {key: _rope_entry(value) for key, value in nested.items()}
    return _rope_entry(stated) if stated else {}


def _rope_entry(stated: Mapping[str, Any]) -> dict[str, Any]:
    entry = {key: value for key, value in stated.items() if value is not None and key != "type"}
    kind = entry.setdefault("rope_type", stated.get("type", "default"))
    if kind == "linear" and entry.get("factor") == 1:
        kind = entry["rope_type"] = "default"
    entry.setdefault("partial_rotary_factor", 1.0)
    if kind == "default":
        entry = {key: value for key, value in entry.items() if key in _ROPE_PLAIN or not _ROPE_SCALING.search(key)}
    return entry


def _reads_length(rope: Mapping[str, Any]) -> bool:
    """Whether frequencies depend on ``max_position_embeddings``: dynamic scaling, or a factor that is left to it."""
    kind = rope["rope_type"]
    return kind not in _ROPE_OF_ANY_LENGTH and (kind == "dynamic" or rope.get("factor") is None)
