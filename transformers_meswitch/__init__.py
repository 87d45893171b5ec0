"""ME-Switch for Hugging Face: one base model, many fine-tunes kept as deltas of 1 to 4 bits a weight.

Importing this package registers ME-Switch with PEFT and transformers; from then on the stock calls load delta repos:
``AutoModelForCausalLM.from_pretrained(delta)``, ``model.load_adapter(delta)``, ``PeftModel.from_pretrained(...)``.
"""

from __future__ import annotations

from .bitdelta.recipe import import_bitdelta
from .compression.recipe import compress
from .configuration import MESwitchConfig, MESwitchExpertConfig, MESwitchFamilyConfig
from .distillation.recipe import distill
from .errors import MESwitchError
from .export.lora import ExtractedLora, extract_lora
from .export.merged_checkpoint import MergedCheckpoint, merge_checkpoint
from .modeling import MESwitchModel, MESwitchModelForCausalLM
from .pipelines import MESwitchTextGenerationPipeline
from .registration import register
from .routing.head import HeadRouter
from .routing.multiple_choice import MultipleChoiceRouter
from .routing.output import RouterOutput
from .verification.evidence import Evidence
from .verification.verify import verify

__version__ = "0.2.0.dev0"

__all__ = [
    "Evidence",
    "ExtractedLora",
    "HeadRouter",
    "MESwitchConfig",
    "MESwitchError",
    "MESwitchExpertConfig",
    "MESwitchFamilyConfig",
    "MESwitchModel",
    "MESwitchModelForCausalLM",
    "MESwitchTextGenerationPipeline",
    "MergedCheckpoint",
    "MultipleChoiceRouter",
    "RouterOutput",
    "compress",
    "distill",
    "extract_lora",
    "import_bitdelta",
    "merge_checkpoint",
    "verify",
]

register()
