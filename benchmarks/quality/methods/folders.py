"""The package's own compression as a user runs it: from checkpoints to a delta repo, with budgets and distillation."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers_meswitch import MESwitchConfig, compress, distill
from transformers_meswitch.delta_format.reader import open_delta
from transformers_meswitch.delta_format.spec import tensor_key

from ..experts import write_checkpoint
from .base import Compressed, Inputs
from .ours import collected

__all__ = ["from_folders"]


def from_folders(inputs: Inputs, config: MESwitchConfig, *, distilled: bool = False) -> Compressed:
    """What ``meswitch compress``, and ``meswitch distill`` after it, write of the expert.

    Args:
        inputs: the expert, with ``base_folder`` and ``texts``.
        config: how to compress.
        distilled: whether steps are distilled.
    """
    assert inputs.base_folder is not None
    device = next(iter(inputs.expert.values())).device
    with tempfile.TemporaryDirectory() as scratch:
        expert = write_checkpoint(inputs.base_folder, inputs.expert, Path(scratch) / "expert")
        folder = compress(
            inputs.base_folder, expert, Path(scratch) / "delta", config, inputs.texts, device=device, progress=False
        )
        if distilled:
            folder = distill(
                inputs.base_folder,
                expert,
                folder,
                Path(scratch) / "distilled",
                inputs.texts,
                steps=inputs.distillation_steps,
                device=device,
                progress=False,
            )
        delta = open_delta(folder)
        tensors = delta.tensors()
        return collected(
            inputs,
            [
                (name, record, {leaf: tensors[tensor_key(name, leaf)].to(device) for leaf in record.leaves()})
                for name, record in delta.records.items()
            ],
        )
