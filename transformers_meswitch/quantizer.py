"""Compress on load: ``AutoModelForCausalLM.from_pretrained(expert, quantization_config=MESwitchConfig(base, ...))``.

transformers loads the fine-tune as it always does; then each module is compared with the base's checkpoint, its delta
attached as an expert, and its weights replaced by the base's. What comes out is a base with one expert, whose
``save_pretrained`` and ``push_to_hub`` write a delta repo.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .compression.assets import generation_config_of
from .compression.driver import compress_modules
from .compression.expert_config import expert_config
from .compression.sources import CheckpointParameters, LiveParameters, Parameters, meta_model, output_head
from .configuration import MESwitchConfig
from .delta_format.checkpoint import resolve_checkpoint
from .delta_format.fingerprint import fingerprint_checkpoint
from .delta_format.location import RepoLocation
from .delta_format.spec import ModuleRecord, tensor_key
from .errors import CheckpointError, CompressionError, UnsupportedModelError
from .peft_method.attachment import ensure_switch

__all__ = ["MESwitchHfQuantizer", "register"]

_METHOD = "meswitch"


class MESwitchHfQuantizer(HfQuantizer):
    """The hook that transformers calls around loading a fine-tune with a :class:`MESwitchConfig`."""

    requires_calibration = False
    quantization_config: MESwitchConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            CompressionError: no base named, or the checkpoint is already quantised with this method.
            UnsupportedModelError: disk offload.
        """
        if self.pre_quantized:
            raise CompressionError(
                "This checkpoint's config.json names the quantisation method 'meswitch', which delta repos never do. "
                "Load deltas without a quantization_config."
            )
        if not self.quantization_config.base_model_name_or_path:
            raise CompressionError(
                "MESwitchConfig needs base_model_name_or_path: the base that this expert was fine-tuned from."
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedModelError("Compressing on load does not support disk offload; use compress() instead.")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        with torch.no_grad():
            return _split(model, self.quantization_config)

    def is_serializable(self) -> bool:
        """A compressed model is saved as a delta repo."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Deltas are not trained."""
        return False


def _split(model: PreTrainedModel, config: MESwitchConfig) -> PreTrainedModel:
    """Turn a loaded fine-tune into its base with the fine-tune as the expert ``"default"``."""
    expert = RepoLocation(str(model.name_or_path), error=CheckpointError)
    base = str(config.base_model_name_or_path)
    files = resolve_checkpoint(base, config.base_revision)
    base_config = AutoConfig.from_pretrained(base, revision=config.base_revision)
    if base_config.model_type != model.config.model_type:
        raise CompressionError(
            f"{expert} is of model_type {model.config.model_type!r} and {base} of {base_config.model_type!r}; a delta "
            "needs a fine-tune of this base."
        )
    base_parameters = CheckpointParameters(meta_model(base_config), files)
    expert_parameters = LiveParameters(model)
    records: dict[str, ModuleRecord] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, record, leaves in compress_modules(model, base_parameters, expert_parameters, config):
        records[name] = record
        tensors.update({tensor_key(name, leaf): tensor for leaf, tensor in leaves.items()})
    if not records:
        raise CompressionError(
            f"{expert} and {base} hold equal weights; there is no delta to store. Give a fine-tune."
        )
    embedding = model.get_input_embeddings()
    delta = expert_config(
        config,
        records,
        base=base,
        base_revision=files.revision,
        base_fingerprint=fingerprint_checkpoint(files.paths),
        expert=str(model.name_or_path),
        model_config=model.config,
        generation_config=model.generation_config,  # type: ignore[arg-type]
        vocab_size=int(embedding.num_embeddings),  # type: ignore[arg-type]
        tied=expert_parameters.tied,
        calibrated=False,
    )
    _restore_base(model, base_parameters)
    _adopt_config(model, base_config, base)
    switch = ensure_switch(model)
    base_location = RepoLocation(base, config.base_revision, error=CheckpointError)
    eos = generation_config_of(base_location, base_config).eos_token_id
    switch.base_eos_token_id = () if eos is None else tuple([eos] if isinstance(eos, int) else eos)
    cast(Any, model).attach_delta("default", delta, tensors, assets=expert)
    return model


def _restore_base(model: PreTrainedModel, base: Parameters) -> None:
    """Give every module the base's parameters, in the dtype and on the device it has, with the base's tying."""
    head = output_head(model)
    embedding = model.get_input_embeddings()
    for name in base.modules:
        module = model.get_submodule(name)
        for key, value in base.of(name).items():
            current = module._parameters[key]
            assert current is not None
            module._parameters[key] = nn.Parameter(
                value.to(current.device, current.dtype, copy=True), requires_grad=False
            )
        _resize(module)
        if name == head and base.tied:
            module._parameters["weight"] = embedding._parameters["weight"]


def _resize(module: nn.Module) -> None:
    """Let an embedding or head state the number of rows that its new weight has."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Embedding) and weight is not None:
        module.num_embeddings = weight.shape[0]
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features = weight.shape[0]


def _adopt_config(model: PreTrainedModel, base: PreTrainedConfig, name: str) -> None:
    """The model is now the base: its config says so wherever a fine-tune may differ."""
    ours, theirs = model.config.get_text_config(), base.get_text_config()
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(ours, key, getattr(theirs, key, None))
    model.config.tie_word_embeddings = base.tie_word_embeddings
    model.config._name_or_path = name
    model.name_or_path = name


def register() -> None:
    """Register the method with transformers. Idempotent."""
    if _METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_METHOD)(MESwitchConfig)
        register_quantizer(_METHOD)(MESwitchHfQuantizer)
