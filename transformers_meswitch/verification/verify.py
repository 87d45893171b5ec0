"""``verify``: base, expert and base + delta side by side, with one model in memory at a time."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import platform
import tempfile
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from ..cards import hub_id
from ..compression.calibration import Calibration
from ..compression.sources import Source
from ..delta_format.reader import Delta
from ..delta_format.spec import LinearRecord
from ..devices import best_device
from ..errors import VerificationError
from ..inspection import relative_errors
from ..modeling import MESwitchModelForCausalLM
from .evidence import Evidence, TextEvidence, WeightEvidence, tensors_digest
from .fidelity import Fidelity, perplexity
from .inputs import folder_of, open_inputs
from .saved import check_saveable, save_evidence
from .text import MIN_TOKENS, logits_of, read_pieces, tokenizer_of

__all__ = ["verify"]

#: Name of the delta on the base.
_DELTA = "delta"


def verify(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    texts: Calibration | None = None,
    *,
    max_tokens: int = 4096,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    base_revision: str | None = None,
    expert_revision: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    save: bool = False,
    progress: bool = True,
    full_fingerprint: bool = False,
) -> Evidence:
    """Measure how well a delta stands for the expert that it was made from.

    The weights are compared layer by layer, with one layer in memory. Given text, the expert is run on it first, and
    its logits wait in a temporary file: at most ``max_tokens`` × vocabulary × bytes of ``dtype`` (1.05 GB for 4,096
    tokens, a vocabulary of 128,256 and bfloat16). Then the base is run, with and without the delta. So one full model
    and the delta are in memory at a time, with the logits of at most 512 tokens of each of the three. Divergences are
    worked out in float32 from the models' logits.

    Args:
        base: folder or Hub id of the base's checkpoint.
        expert: folder or Hub id of the fine-tune's.
        delta: folder or Hub id of the delta repo.
        texts: what the expert typically sees, and better not what the delta was calibrated on; see
            :func:`~transformers_meswitch.compression.calibration.read_samples`. `None` compares the weights only.
        max_tokens: how much of the text to run at most.
        device: where to run; by default an accelerator if there is one.
        dtype: of weights and activations of all three; by default float32 on a CPU, and the base checkpoint's dtype
            elsewhere.
        base_revision: branch, tag or commit of the base; by default what the delta names, if it names this base.
        expert_revision: branch, tag or commit of the expert.
        revision: branch, tag or commit of the delta repo.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        save: keep the evidence in the delta's folder, as ``meswitch_evidence.json`` and in the card.
        progress: whether to show progress bars.
        full_fingerprint: compare every byte of the base with the one that the delta was formed against, which
            ``compress(full_fingerprint=True)`` recorded, not samples.

    Raises:
        BaseMismatchError: the delta was formed against another base.
        CheckpointError: a missing, truncated or unreadable checkpoint.
        CompressionError: text that cannot be read; a quantised checkpoint.
        DeltaFormatError: the delta is malformed, or does not fit base and expert.
        VerificationError: a delta on the Hub to save evidence in; too little text; a tokenizer that is missing or not
            the expert's; logits that are not numbers.
    """
    if save:
        check_saveable(delta)
    inputs = open_inputs(
        base,
        expert,
        delta,
        base_revision=base_revision,
        expert_revision=expert_revision,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        full_fingerprint=full_fingerprint,
    )
    of_base, of_expert, opened = inputs.base, inputs.expert, inputs.delta

    def bar(names: Iterable[str]) -> Iterable[str]:
        return tqdm(names, desc="Comparing weights", unit="layer", disable=not progress)

    weights = WeightEvidence(
        relative_errors(opened, folder_of(of_base), folder_of(of_expert), progress=bar), _weights_by_bits(opened)
    )
    text = None
    if texts is not None:
        where = torch.device(device) if device is not None else best_device()
        dtype = dtype or (torch.float32 if where.type == "cpu" else of_base.config.dtype or torch.float32)
        text = _run(of_base, of_expert, opened, texts, max_tokens, where, dtype, progress)
    evidence = Evidence(
        tensors_sha256=tensors_digest(opened.tensors()),
        base=hub_id(os.fspath(base)),
        base_revision=of_base.checkpoint.revision,
        expert=hub_id(os.fspath(expert)),
        expert_revision=of_expert.checkpoint.revision,
        date=datetime.now(timezone.utc).date().isoformat(),
        versions=_versions(),
        weights=weights,
        text=text,
    )
    if save:
        save_evidence(opened, evidence, folder_of(of_base))
    return evidence


def _weights_by_bits(delta: Delta) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in delta.records.values():
        if isinstance(record, LinearRecord):
            bits = str(record.bits)
            counts[bits] = counts.get(bits, 0) + record.out_features * record.coded_channels
    return dict(sorted(counts.items()))


def _versions() -> dict[str, str]:
    from .. import __version__

    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"transformers-meswitch": __version__, **packages, "python": platform.python_version()}


def _run(
    base: Source,
    expert: Source,
    delta: Delta,
    texts: Calibration,
    max_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
) -> TextEvidence:
    """Run expert, base, and base + delta on the same text."""
    pieces = read_pieces(tokenizer_of(expert.location), texts, expert, max_tokens)
    comparison = _Comparison()
    with tempfile.TemporaryDirectory(prefix="meswitch-", ignore_cleanup_errors=True) as folder:
        files = [Path(folder, str(i)) for i in range(len(pieces))]
        vocab_size = _keep_logits(expert, pieces, files, device, dtype, progress)
        if delta.config.vocab_size not in (None, vocab_size):
            raise VerificationError(
                f"The expert has a vocabulary of {vocab_size} tokens, and the delta is of one with "
                f"{delta.config.vocab_size}: it is not this expert's."
            )
        gc.collect()  # the expert's memory is wanted for the base
        model: Any = MESwitchModelForCausalLM.from_pretrained(
            folder_of(base), experts={_DELTA: str(delta.files.directory)}, dtype=dtype
        )
        model.to(device).eval()
        shared = min(model._meswitch_switch.base_vocab_size, vocab_size)
        todo = list(zip(pieces, files, strict=True))
        for ids, file in tqdm(todo, desc="Running base and delta", unit="text", disable=not progress):
            comparison.add(model, ids, load(file.read_bytes())["logits"].to(device), shared)
            file.unlink()
    return comparison.evidence(
        vocab_size=vocab_size,
        shared_vocab_size=shared,
        tokens_sha256=_tokens_digest(pieces),
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


class _Comparison:
    """Base and base + delta against the expert's logits, piece of text by piece of text."""

    def __init__(self) -> None:
        #: Over the expert's vocabulary, at every token.
        self.delta = Fidelity()
        #: Over the vocabulary that base and expert share, at the tokens of it.
        self.shared_base, self.shared_delta = Fidelity(), Fidelity()

    def add(self, model: Any, ids: list[int], reference: Tensor, shared: int) -> None:
        """Run base, and base + delta, on one piece.

        Args:
            model: the base with the delta attached.
            ids: the piece's token ids.
            reference: the expert's logits ``[len(ids) - 1, vocabulary]``.
            shared: size of the vocabulary that base and expert share.
        """
        vocab_size = reference.shape[-1]
        model.set_expert(_DELTA)
        of_delta = logits_of(model, ids)[:, :vocab_size]
        self.delta.add(reference, of_delta, torch.tensor(ids[1:]))
        # The base reads the text without the tokens that it does not know.
        known = torch.tensor([place for place, token in enumerate(ids) if token < shared])
        if len(known) < 2:
            return
        model.set_expert(None)
        kept = torch.tensor(ids)[known]
        of_base = logits_of(model, kept.tolist())[:, :shared]
        rows = (known[1:] - 1).to(reference.device)
        of_expert, targets = reference[rows, :shared], kept[1:]
        self.shared_base.add(of_expert, of_base, targets)
        self.shared_delta.add(of_expert, of_delta[rows, :shared], targets)

    def evidence(self, **facts: Any) -> TextEvidence:
        """The means, beside facts that are not measured here.

        Raises:
            VerificationError: a model gave NaN, or the base knows too few of the tokens.
        """
        delta, base, shared_delta = self.delta, self.shared_base, self.shared_delta
        if base.tokens < MIN_TOKENS:
            raise VerificationError(
                f"The base knows {base.tokens} of the text's {delta.tokens} predicted tokens, expected at least "
                f"{MIN_TOKENS}. Check that base and expert belong together, and give more text."
            )
        for who, figure in (("expert", base.reference_nll), ("delta", delta.kl), ("base", base.kl)):
            if math.isnan(figure):
                raise VerificationError(
                    f"The {who} gives logits that are not numbers in {facts['dtype']}. Try dtype float32; if that "
                    "gives the same, its weights are damaged."
                )
        return TextEvidence(
            tokens=delta.tokens,
            shared_tokens=base.tokens,
            kl=delta.mean_kl,
            kl_base=base.mean_kl,
            top1_agreement=delta.agreement,
            top1_agreement_base=base.agreement,
            perplexity_base=perplexity(base.model_nll, base.tokens),
            perplexity_expert=perplexity(base.reference_nll, base.tokens),
            perplexity_delta=perplexity(shared_delta.model_nll, shared_delta.tokens),
            **facts,
        )


def _keep_logits(
    expert: Source,
    pieces: list[list[int]],
    files: list[Path],
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
) -> int:
    """Run the expert, and write a piece's logits into each file; returns the size of the expert's vocabulary."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder_of(expert), dtype=dtype)
    model.to(device).eval()
    vocab_size = int(model.get_input_embeddings().num_embeddings)
    largest = max(map(max, pieces))
    if largest >= vocab_size:
        raise VerificationError(
            f"The tokenizer of {expert.location} gives the id {largest}, but the model has {vocab_size} tokens. Save "
            "the tokenizer that the expert was trained with beside it."
        )
    todo = list(zip(pieces, files, strict=True))
    for ids, file in tqdm(todo, desc="Running the expert", unit="text", disable=not progress):
        # As bytes, not as a file that stays mapped: it is deleted as soon as it was read.
        file.write_bytes(save({"logits": logits_of(model, ids)[:, :vocab_size].cpu().contiguous()}))
    return vocab_size


def _tokens_digest(pieces: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for ids in pieces:
        digest.update(b"".join(token.to_bytes(4, "little") for token in ids))
    return digest.hexdigest()
