"""Compress on load: ``AutoModelForCausalLM.from_pretrained(expert, quantization_config=MESwitchConfig(base, ...))``.

transformers loads the fine-tune as it always does; then each module is compared with the base's checkpoint, its delta
attached as an expert, and its weights replaced by the base's. What comes out is a base with one expert, whose
``save_pretrained`` and ``push_to_hub`` write a delta repo.

The expert's tokenizer and generation config are those beside the weights that transformers loaded: of the same commit,
in the same cache, where the base is looked for too. transformers does not hand on ``token=``, so private repos need
the stored one (``hf auth login`` or ``HF_TOKEN``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .compression.assets import find_assets, generation_config_of
from .compression.driver import check_model_type, compress_expert
from .compression.sources import (
    CheckpointParameters,
    LiveParameters,
    Parameters,
    Source,
    locate,
    meta_model,
    output_head,
)
from .compression.work_folder import ModulesInMemory
from .configuration import MESwitchConfig
from .delta_format.location import RepoLocation
from .errors import CheckpointError, CompressionError, UnsupportedModelError
from .peft_method.attachment import ensure_switch

__all__ = ["MESwitchHfQuantizer", "register"]

_METHOD = "meswitch"
_SNAPSHOT = re.compile(r"(.*)[/\\]models--[^/\\]+[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\](.*))?")


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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CompressionError(
                "Compressing on load needs a checkpoint in files; save the model and give its folder."
            )
        config = self.quantization_config
        self._expert = _location_of(str(model.name_or_path), checkpoint_files[0])
        base = str(config.base_model_name_or_path)
        self._base = locate(
            RepoLocation(base, config.base_revision, cache_dir=self._expert.cache_dir, error=CheckpointError)
        )
        check_model_type(self._base, self._expert, model.config)
        find_assets(self._expert)  # fetched now, so that saving needs no network and a failure costs no loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        with torch.no_grad():
            return _split(model, self._base, self._expert, self.quantization_config)

    def is_serializable(self) -> bool:
        """A compressed model is saved as a delta repo."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Deltas are not trained."""
        return False


def _location_of(name: str, file: str) -> RepoLocation:
    """The repo that a checkpoint's file was read from: its folder, or its Hub id at the file's commit and cache."""
    folder = os.path.dirname(file)
    snapshot = None if os.path.isdir(name) else _SNAPSHOT.fullmatch(folder)
    if snapshot is None:
        return RepoLocation(folder, error=CheckpointError)
    cache_dir, commit, subfolder = snapshot.groups()
    return RepoLocation(name, commit, subfolder, cache_dir=cache_dir, error=CheckpointError)


def _split(model: PreTrainedModel, base: Source, expert: RepoLocation, config: MESwitchConfig) -> PreTrainedModel:
    """Turn a loaded fine-tune into its base with the fine-tune as the expert ``"default"``."""
    base_parameters = CheckpointParameters(meta_model(base.config), base.checkpoint)
    finished = ModulesInMemory()
    delta = compress_expert(
        model,
        base,
        base_parameters,
        expert,
        LiveParameters(model),
        config,
        finished,
        generation_config=model.generation_config,  # type: ignore[arg-type]
    )
    _restore_base(model, base_parameters)
    _adopt_config(model, base.config, base.location.repo)
    switch = ensure_switch(model)
    if not base.location.is_local:
        switch.base_download = {"revision": base.location.revision, "cache_dir": base.location.cache_dir}
    eos = generation_config_of(base.location, base.config).eos_token_id
    switch.base_eos_token_id = () if eos is None else tuple([eos] if isinstance(eos, int) else eos)
    cast(Any, model).attach_delta("default", delta, finished.tensors, assets=expert)
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
