"""Making PEFT and transformers know ME-Switch. Idempotent; needs no GPU and no network."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import pipelines
from .configuration import MESwitchFamilyConfig
from .modeling import MESwitchModel, MESwitchModelForCausalLM
from .peft_method import tuner

__all__ = ["register"]


def register() -> None:
    """Register the PEFT method, the family's classes, the producer's quantizer and the pipeline."""
    from . import quantizer

    tuner.register()
    AutoConfig.register("meswitch", MESwitchFamilyConfig, exist_ok=True)
    AutoModelForCausalLM.register(MESwitchFamilyConfig, MESwitchModelForCausalLM, exist_ok=True)
    AutoModel.register(MESwitchFamilyConfig, MESwitchModel, exist_ok=True)
    quantizer.register()
    pipelines.register()
