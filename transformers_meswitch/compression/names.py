"""Which tensor of a checkpoint is which parameter of the model that transformers builds.

Checkpoints on the Hub spell names in many ways: GPT-2's lack ``transformer.``, GPT-NeoX's call the output head
``embed_out``. transformers knows how to read each; this file asks it, and is the only one that touches that
machinery (``transformers.core_model_loading``, ``transformers.conversion_mapping``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import CompressionError, UnsupportedModelError

__all__ = ["NameMap", "map_names"]

#: Tensors that older releases of transformers saved although the model computes them itself.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")


@dataclass(frozen=True)
class NameMap:
    """How the names of one checkpoint and of the model correspond.

    Attributes:
        checkpoint_name: name in the model's state dict to name in the checkpoint.
        unknown: names in the checkpoint that the model has no place for, sorted; buffers that it computes itself are
            left out.
    """

    checkpoint_name: dict[str, str]
    unknown: tuple[str, ...]


def map_names(model: PreTrainedModel, names: Iterable[str]) -> NameMap:
    """Find the place of each tensor of a checkpoint in a model.

    Args:
        model: the causal LM, on any device, ``meta`` included.
        names: names of the checkpoint's tensors.

    Raises:
        UnsupportedModelError: transformers would fuse or split the tensor when loading it.
        CompressionError: two tensors claim one place.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    ignored = [_COMPUTED, *(re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ())]
    found: dict[str, str] = {}
    unknown: list[str] = []
    for name in sorted(names):
        canonical, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if canonical not in state and name in state:
            canonical, converter = name, None
        if canonical not in state:
            if not any(pattern.search(name) for pattern in ignored):
                unknown.append(name)
            continue
        if converter is not None:
            raise UnsupportedModelError(
                f"The checkpoint's {name} becomes a part of {canonical} when transformers loads "
                f"{type(model).__name__}: it fuses or splits that layer. Deltas are formed of tensors that are the "
                "model's own parameters; models with such layers are not supported."
            )
        if canonical in found:
            raise CompressionError(
                f"The checkpoint's {found[canonical]} and {name} are both {canonical} of {type(model).__name__}."
            )
        found[canonical] = name
    return NameMap(found, tuple(unknown))
