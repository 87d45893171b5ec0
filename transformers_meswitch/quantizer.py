"""Compress on load: ``AutoModelForCausalLM.from_pretrained(expert, quantization_config=MESwitchConfig(base, ...))``.

transformers loads the fine-tune as it always does; then each module is compared with the base's checkpoint, its delta
attached as an expert, and its weights replaced by the base's. What comes out is a base with one expert, whose
``save_pretrained`` and ``push_to_hub`` write a delta repo.

The expert's tokenizer and generation config are those beside the weights that transformers loaded: of the same commit,
in the same cache, where the base is looked for too. transformers does not hand on ``token=``, so private repos need
the stored one (``hf auth login`` or ``HF_TOKEN``).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .compression.architecture import check_same_computation
from .compression.assets import find_assets, generation_config_of
from .compression.driver import compress_expert
from .compression.sources import (
    CheckpointParameters,
    LiveParameters,
    Parameters,
    Source,
    check_unknown,
    locate,
    meta_model,
    output_head,
)
from .compression.work_folder import ModulesInMemory
from .configuration import MESwitchConfig
from .delta_format.checkpoint import Checkpoint
from .delta_format.location import RepoLocation
from .errors import CheckpointError, CompressionError, UnsupportedModelError
from .peft_method.attachment import ensure_switch

__all__ = ["MESwitchHfQuantizer", "register"]

_METHOD = "meswitch"
#: Keys of a configuration that say how a model was loaded, and not what it is.
_AS_LOADED = ("dtype", "_attn_implementation_internal", "_experts_implementation_internal")
_SNAPSHOT = re.compile(r"(.*)[/\\]models--[^/\\]+[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\](.*))?")


class MESwitchHfQuantizer(HfQuantizer):
    """The hook that transformers calls around loading a fine-tune with a :class:`MESwitchConfig`."""

    requires_calibration = False
    quantization_config: MESwitchConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            CompressionError: no base named, a budget, or the checkpoint is already quantised with this method.
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
        if self.quantization_config.budget is not None:
            name, value = self.quantization_config.budget
            raise CompressionError(
                f"{name}={value!r} is a budget, which compressing on load does not keep: it has no calibration text "
                "to find out where bits matter. Use compress() or `meswitch compress`, or give bits."
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
        _check_causal_lm(model)
        config = self.quantization_config
        self._expert = _location_of(str(model.name_or_path), checkpoint_files[0])
        base = str(config.base_model_name_or_path)
        self._base = locate(
            RepoLocation(base, config.base_revision, cache_dir=self._expert.cache_dir, error=CheckpointError)
        )
        _check_not_base(self._base, self._expert, checkpoint_files)
        check_same_computation(self._base, self._expert, model.config)
        self._base_parameters = CheckpointParameters(meta_model(self._base.config), self._base.checkpoint)
        _check_complete(model, self._base_parameters, self._expert, checkpoint_files)
        find_assets(self._expert)  # fetched now, so that saving needs no network and a failure costs no loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        with torch.no_grad():
            return _split(model, self._base, self._base_parameters, self._expert, self.quantization_config)

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


def _check_causal_lm(model: PreTrainedModel) -> None:
    """A delta is of a whole causal LM: without the head, an expert would lose what it learnt there."""
    if not isinstance(model, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())):
        raise UnsupportedModelError(
            f"The expert is being loaded as {type(model).__name__}, expected the causal LM that transformers has for "
            f"{type(model.config).__name__}: deltas are of complete causal LMs. Load it with AutoModelForCausalLM."
        )


def _check_not_base(base: Source, expert: RepoLocation, checkpoint_files: Sequence[str]) -> None:
    """Where an adapter is named, transformers loads the adapter's base; do not call that the expert."""
    if {os.path.realpath(file) for file in checkpoint_files} == set(map(os.path.realpath, base.checkpoint.paths)):
        raise CompressionError(
            f"The weights being loaded are the base's own ({expert}), so expert and base hold equal weights. Give a "
            "full fine-tune. If you named a delta repo or an adapter: transformers loads its base first; load a delta "
            "without a quantization_config, and merge an adapter into its base before compressing it."
        )


def _check_complete(
    model: PreTrainedModel, base: CheckpointParameters, expert: RepoLocation, checkpoint_files: Sequence[str]
) -> None:
    """Refuse files that transformers would load in part, leaving the rest to chance, before it does."""
    if not all(str(file).endswith(".safetensors") for file in checkpoint_files):
        raise CheckpointError(
            f"{expert} has its weights in {os.path.basename(checkpoint_files[0])}, expected safetensors. Load it once "
            "without a quantization_config, where you trust it, and save_pretrained() it, which writes safetensors."
        )
    checkpoint = Checkpoint(str(expert), [Path(file) for file in checkpoint_files])
    check_unknown(base, CheckpointParameters(model, checkpoint))


def _split(
    model: PreTrainedModel,
    base: Source,
    base_parameters: CheckpointParameters,
    expert: RepoLocation,
    config: MESwitchConfig,
) -> PreTrainedModel:
    """Turn a loaded fine-tune into its base with the fine-tune as the expert ``"default"``."""
    generation_config = generation_config_of(expert, model.config)
    finished = ModulesInMemory()
    delta = compress_expert(
        model,
        base,
        base_parameters,
        expert,
        LiveParameters(model),
        config,
        finished,
        generation_config=generation_config,
    )
    _restore_base(model, base_parameters)
    theirs = base.config
    _adopt_config(model.config, theirs if type(theirs) is type(model.config) else theirs.get_text_config())
    model.config._name_or_path = model.name_or_path = base.location.repo
    switch = ensure_switch(model)
    if not base.location.is_local:
        switch.base_download = {"revision": base.location.revision, "cache_dir": base.location.cache_dir}
    eos = generation_config_of(base.location, base.config).eos_token_id
    switch.base_eos_token_id = () if eos is None else tuple([eos] if isinstance(eos, int) else eos)
    cast(Any, model).attach_delta("default", delta, finished.tensors, assets=expert)
    switch.generation_config_of = "default"
    model.generation_config = generation_config
    switch.experts["default"] = dataclasses.replace(
        switch.experts["default"], generation_config=generation_config.to_json_string()
    )
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


def _adopt_config(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> None:
    """The model is now the base, and so is its configuration, but for how it was loaded.

    In place, since the model's modules share it.
    """
    loaded = {key: value for key, value in vars(ours).items() if key in _AS_LOADED}
    nested = {key: value for key, value in vars(ours).items() if isinstance(value, PreTrainedConfig)}
    for key, config in nested.items():
        _adopt_config(config, getattr(theirs, key))
    vars(ours).clear()
    vars(ours).update({**copy.deepcopy(vars(theirs)), **loaded, **nested})


def register() -> None:
    """Register the method with transformers. Idempotent."""
    if _METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(_METHOD)(MESwitchConfig)
        register_quantizer(_METHOD)(MESwitchHfQuantizer)
