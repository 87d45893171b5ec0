"""``extract_lora``: what of a delta fits into a LoRA of a rank, for engines that take nothing else."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from ..cards import lora_card
from ..compression.calibration import Calibration
from ..compression.linear import reconstruct_linear
from ..compression.sources import meta_model
from ..delta_format.serialize import file_bytes, write_tensors
from ..delta_format.spec import ADAPTER_CONFIG_NAME, AnyRowsRecord, LinearRecord, ModuleRecord, tensor_key
from ..delta_format.tensor_files import TensorFiles
from ..devices import best_device
from ..errors import UnsupportedOperationError
from ..module_kinds import is_conv1d, is_linear
from ..peft_method.injection import base_vocab_size, plan_injection
from .inputs import Inputs, open_inputs
from .lora_fidelity import LoraFidelity, lora_fidelity, text_pieces
from .low_rank import low_rank
from .output import DTYPES, check_output, check_room, copy_assets, license_of_delta, new_folder, origin_of

__all__ = ["ExtractedLora", "extract_lora"]

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExtractedLora:
    """What :func:`extract_lora` wrote, and what it lost.

    Attributes:
        directory: the folder.
        rank: of every linear's factors.
        total_bytes: bytes of the weight file.
        lost: share of each linear's delta that is not in its factors, ``‖Δ̂ - BA‖ / ‖Δ̂‖`` (Frobenius), by module.
        lost_overall: the same over all linears together.
        left_out: what a LoRA has no place for, kind to number of modules: ``rows`` of embedding and head, ``values``
            of norms, ``biases``.
        text: what this does to predictions, if text was given.
    """

    directory: Path
    rank: int
    total_bytes: int
    lost: dict[str, float]
    lost_overall: float
    left_out: dict[str, int]
    text: LoraFidelity | None


def extract_lora(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    expert: str | None = None,
    *,
    rank: int = 64,
    texts: Calibration | None = None,
    max_tokens: int = 4096,
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ExtractedLora:
    """Write the best low-rank approximation of a delta's linears as a PEFT LoRA repo, and measure what it loses.

    Its config names the base, unless that is in a subfolder on the Hub, for which PEFT has no way of saying.

    A full fine-tune is not of low rank, so this loses much where the delta itself loses next to nothing: look at what
    is returned before you serve it. :func:`~transformers_meswitch.merge_checkpoint` loses nothing.

    Args:
        source: folder or Hub id of a delta repo; of a family repo where ``expert`` is given.
        output_dir: a new or empty folder. It appears when all is written; an interrupted run leaves nothing.
        expert: name of an expert of the family.
        rank: of the factors of each linear.
        texts: what the expert typically sees, to measure the loss on; see
            :func:`~transformers_meswitch.compression.calibration.read_samples`. `None` compares the weights only.
        max_tokens: how much of the text to run at most.
        base: folder or Hub id of the base; by default what the family, or else the delta, names.
        base_revision: branch, tag or commit of the base; by default what is named beside it.
        revision: branch, tag or commit of the delta or family repo.
        subfolder: folder inside it.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        dtype: of the factors: bfloat16, float16 or float32.
        device: where to factorise and to run; by default an accelerator if there is one.
        progress: whether to show progress bars.

    Raises:
        BaseMismatchError: the delta was formed against another base.
        CheckpointError: a missing, truncated or unreadable checkpoint of the base; no such family, or a family without
            ``expert``.
        CompressionError: the base is quantised, or the text cannot be read.
        DeltaFormatError: the delta is malformed, or does not fit the base.
        ExpertNotFoundError: the family has no such expert.
        OutputFolderError: the folder holds something, or its disk has too little room.
        UnsupportedOperationError: the expert has added tokens, or no linear that differs from the base's.
        UnsupportedModelError: the base is of an architecture that transformers itself has not.
        ValueError: a rank below 1, fewer than two tokens, or another dtype.
        VerificationError: too little text, or no tokenizer to read it.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}, expected a whole number from 1.")
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens!r}, expected 2 or more.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}.")
    output = Path(output_dir)
    check_output(output)
    inputs = open_inputs(
        source,
        expert,
        base=base,
        base_revision=base_revision,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    model = meta_model(inputs.base.config)
    plan_injection(model, inputs.delta.config, "expert", {})
    _check_vocabulary(inputs, base_vocab_size(model))
    linears = {name: record for name, record in inputs.delta.records.items() if isinstance(record, LinearRecord)}
    if not linears:
        raise UnsupportedOperationError(
            f"{inputs.delta.files.repo} changes no linear layer, and a LoRA has no place for anything else. Use "
            "meswitch merge."
        )
    where = torch.device(device) if device is not None else best_device()
    pieces = None if texts is None else text_pieces(inputs, texts, max_tokens)
    headers = {}
    for name, record in linears.items():
        headers[_key(name, "A")] = (DTYPES[dtype], (rank, record.in_features))
        headers[_key(name, "B")] = (DTYPES[dtype], (record.out_features, rank))
    check_room(output, file_bytes(headers, {"format": "pt"}))
    factors = _Factors(inputs, linears, rank, dtype, where)
    with new_folder(output, ADAPTER_CONFIG_NAME) as folder:
        with tqdm(total=2 * len(linears), desc="Factorising", unit="factor", disable=not progress) as bar:

            def get(key: str) -> Tensor:
                bar.update()
                return factors.get(key)

            write_tensors(folder / _WEIGHTS, headers, get, {"format": "pt"})
        _lora_config(inputs, model, set(linears), rank).save_pretrained(str(folder))
        copy_assets(inputs, folder)
        text = None if pieces is None else lora_fidelity(inputs, folder, pieces, where, progress)
        found = ExtractedLora(
            output,
            rank,
            (folder / _WEIGHTS).stat().st_size,
            factors.lost,
            factors.lost_overall,
            _left_out(inputs.delta.records),
            text,
        )
        card = lora_card(
            inputs.delta.config,
            origin_of(inputs),
            expert,
            rank=rank,
            lost=found.lost_overall,
            left_out=found.left_out,
            kl=None if text is None else (text.kl, text.kl_base, text.tokens),
            license=license_of_delta(inputs),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return found


class _Factors:
    """Factors of the linears' deltas, and what they lose; the two of a linear are asked for one after the other.

    Attributes:
        lost: share of each delta that is lost, by module.
    """

    def __init__(
        self, inputs: Inputs, linears: dict[str, LinearRecord], rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tensors = TensorFiles(inputs.delta.files.weight_paths)
        self._linears, self._rank, self._dtype, self._device = linears, rank, dtype, device
        self._modules = {_key(name, which): (name, which) for name in linears for which in "AB"}
        self._held: tuple[str, dict[str, Tensor]] = ("", {})
        self._squares = torch.zeros(2, dtype=torch.float64)
        self.lost: dict[str, float] = {}

    @property
    def lost_overall(self) -> float:
        """Share of all deltas together that is lost."""
        error, norm = self._squares.tolist()
        return math.sqrt(error / norm) if norm else 0.0

    def get(self, key: str) -> Tensor:
        """A factor by its name on disk."""
        name, which = self._modules[key]
        if self._held[0] != name:
            self._held = (name, self._factorise(name))
        return self._held[1][which]

    def _factorise(self, name: str) -> dict[str, Tensor]:
        record = self._linears[name]
        leaves = {leaf: self._tensors.read(tensor_key(name, leaf)).to(self._device) for leaf in record.leaves()}
        delta = reconstruct_linear(record, leaves)
        b, a = (factor.to(self._dtype) for factor in low_rank(delta, self._rank))
        error = float((delta - b.float() @ a.float()).double().square().sum())
        norm = float(delta.double().square().sum())
        self._squares += torch.tensor([error, norm], dtype=torch.float64)
        self.lost[name] = math.sqrt(error / norm) if norm else 0.0
        return {"A": a, "B": b}


def _key(module: str, which: str) -> str:
    """PEFT's name on disk of a factor."""
    return f"base_model.model.{module}.lora_{which}.weight"


def _check_vocabulary(inputs: Inputs, known: int) -> None:
    size = inputs.delta.config.vocab_size
    if size is not None and size > known:
        raise UnsupportedOperationError(
            f"The expert has {size} tokens and its base {known}: a LoRA cannot add any. Use meswitch merge."
        )


def _left_out(records: dict[str, ModuleRecord]) -> dict[str, int]:
    found = {
        "rows": sum(isinstance(record, AnyRowsRecord) for record in records.values()),
        "biases": sum(isinstance(record, LinearRecord) and record.bias for record in records.values()),
    }
    others = len(records) - found["rows"] - sum(isinstance(record, LinearRecord) for record in records.values())
    return {kind: count for kind, count in (*found.items(), ("values", others)) if count}


def _lora_config(inputs: Inputs, model: PreTrainedModel, linears: set[str], rank: int) -> LoraConfig:
    origin = origin_of(inputs)
    head = model.get_output_embeddings()
    # A name such as q_proj where all that have it are in the delta, as engines know them; else whole names.
    others = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and name not in linears
    }
    short = {name.rpartition(".")[2] for name in linears} - others
    whole = {name for name in linears if name.rpartition(".")[2] not in short}
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=origin.base,
        revision=origin.base_revision,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(short | whole),
        fan_in_fan_out=any(is_conv1d(model.get_submodule(name)) for name in linears),
    )
