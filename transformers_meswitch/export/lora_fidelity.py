"""What an extracted LoRA loses of its delta, measured on text."""

from __future__ import annotations

import gc
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load, save
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from ..compression.calibration import Calibration
from ..delta_format.location import RepoLocation
from ..errors import VerificationError
from ..modeling import MESwitchModelForCausalLM
from ..verification.fidelity import Fidelity
from ..verification.inputs import folder_of
from ..verification.text import logits_of, read_pieces, tokenizer_of
from .inputs import Inputs
from .output import tokenizer_folder

__all__ = ["LoraFidelity", "lora_fidelity", "text_pieces"]


@dataclass(frozen=True)
class LoraFidelity:
    """How far from base + delta the base is, with the LoRA and without.

    Attributes:
        tokens: predicted tokens.
        kl: KL(base + delta ‖ base + LoRA) a token, nats.
        kl_base: KL(base + delta ‖ base) a token, nats.
        top1_agreement: share of tokens at which base + LoRA has the same most probable next token as base + delta.
        top1_agreement_base: the same of the base alone.
    """

    tokens: int
    kl: float
    kl_base: float
    top1_agreement: float
    top1_agreement_base: float


def text_pieces(inputs: Inputs, texts: Calibration, max_tokens: int) -> list[list[int]]:
    """Token ids of text, as the expert's tokenizer has them, in pieces.

    Args:
        inputs: the delta and its base, whose tokenizer is taken where the delta has none.
        texts: see :func:`~transformers_meswitch.compression.calibration.read_samples`.
        max_tokens: how much of the text to take at most.

    Raises:
        CompressionError: text that cannot be read.
        VerificationError: too little text, or no tokenizer.
    """
    folder = tokenizer_folder(inputs)
    if folder is None:
        raise VerificationError(
            f"Neither {inputs.delta.files.repo} nor {inputs.base.location} has a tokenizer, which running text needs. "
            "Leave the text out to compare the weights only."
        )
    return read_pieces(tokenizer_of(RepoLocation(str(folder))), texts, inputs.base, max_tokens)


def lora_fidelity(
    inputs: Inputs, lora: Path, pieces: list[list[int]], device: torch.device, progress: bool
) -> LoraFidelity:
    """Run base + delta, base + LoRA and the base on the same text, one model in memory at a time.

    The logits of the first wait in a temporary file: as many numbers as there are tokens × vocabulary.

    Args:
        inputs: the delta and its base.
        lora: folder of the LoRA.
        pieces: token ids, see :func:`text_pieces`.
        device: where to run; in float32 on a CPU, elsewhere in the dtype of the base's checkpoint.
        progress: whether to show progress bars.

    Raises:
        VerificationError: logits that are not numbers.
    """
    base = folder_of(inputs.base)
    dtype = torch.float32 if device.type == "cpu" else inputs.base.config.dtype or torch.float32
    with_lora, alone = Fidelity(), Fidelity()
    with tempfile.TemporaryDirectory(prefix="meswitch-", ignore_cleanup_errors=True) as folder:
        files = [Path(folder, str(i)) for i in range(len(pieces))]
        todo = list(zip(pieces, files, strict=True))
        delta = str(inputs.delta.files.directory)
        model: Any = MESwitchModelForCausalLM.from_pretrained(base, experts={"delta": delta}, dtype=dtype)
        model.to(device).eval().set_expert("delta")
        for ids, file in tqdm(todo, desc="Running base and delta", unit="text", disable=not progress):
            file.write_bytes(save({"logits": logits_of(model, ids).cpu().contiguous()}))
        del model
        gc.collect()  # the memory is wanted for the base
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        adapted = PeftModel.from_pretrained(plain, str(lora)).to(device).eval()
        for ids, file in tqdm(todo, desc="Running base and LoRA", unit="text", disable=not progress):
            reference, targets = load(file.read_bytes())["logits"].to(device), torch.tensor(ids[1:])
            file.unlink()
            with_lora.add(reference, logits_of(adapted, ids), targets)
            with adapted.disable_adapter():
                alone.add(reference, logits_of(adapted, ids), targets)
    if math.isnan(with_lora.kl) or math.isnan(alone.kl):
        raise VerificationError(
            f"The models give logits that are not numbers in {dtype}. Leave the text out, or take another base dtype."
        )
    return LoraFidelity(with_lora.tokens, with_lora.mean_kl, alone.mean_kl, with_lora.agreement, alone.agreement)
