"""What an extracted LoRA loses of its delta, measured on text."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load, save
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from ..compression.calibration import Calibration, read_samples
from ..delta_format.location import RepoLocation
from ..errors import VerificationError
from ..modeling import MESwitchModelForCausalLM
from ..verification.fidelity import Fidelity
from ..verification.inputs import folder_of
from ..verification.text import MIN_TOKENS, logits_of, piece_length, pieces_of, tokenizer_of
from .inputs import Inputs

__all__ = ["LoraFidelity", "lora_fidelity"]


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


def lora_fidelity(
    inputs: Inputs, lora: Path, texts: Calibration, max_tokens: int, device: torch.device, progress: bool
) -> LoraFidelity:
    """Run base + delta, base + LoRA and the base on the same text, one model in memory at a time.

    The logits of the first wait in a temporary file: at most ``max_tokens`` × vocabulary numbers.

    Args:
        inputs: the delta and its base.
        lora: folder of the LoRA.
        texts: see :func:`~transformers_meswitch.compression.calibration.read_samples`.
        max_tokens: how much of the text to run at most.
        device: where to run.
        progress: whether to show progress bars.

    Raises:
        VerificationError: too little text, or a tokenizer that cannot be read.
    """
    tokenizer = tokenizer_of(RepoLocation(str(lora)))
    pieces = list(pieces_of(tokenizer, read_samples(texts, tokenizer), piece_length(inputs.base), max_tokens))
    if sum(map(len, pieces)) < MIN_TOKENS:
        raise VerificationError(
            f"The text has {sum(map(len, pieces))} tokens, expected at least {MIN_TOKENS}. Give samples of what the "
            "expert is asked and answers."
        )
    base, dtype = folder_of(inputs.base), torch.float32 if device.type == "cpu" else torch.bfloat16
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
    return LoraFidelity(with_lora.tokens, with_lora.mean_kl, alone.mean_kl, with_lora.agreement, alone.agreement)
