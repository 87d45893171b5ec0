"""From a delta repo to one with trained steps: the expert runs first, then the base with the delta is trained."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from ..cards import write_delta_card
from ..compression.architecture import check_same_computation
from ..compression.assets import find_assets, license_of
from ..compression.calibration import DEFAULT, Calibration, describe
from ..compression.linear import reconstruct_linear
from ..compression.recipe import calibration_text, source_identity, usable, versions
from ..compression.request import check_request
from ..compression.sources import CheckpointParameters, Source, input_embedding, meta_model
from ..compression.work_folder import disk_errors, request_folder, write_whole
from ..configuration import MESwitchConfig
from ..delta_format.reader import Delta
from ..delta_format.spec import FORMAT_VERSION, LinearRecord, tensor_key
from ..delta_format.writer import write_delta
from ..errors import DistillationError
from ..inspection import full_copy_bytes
from ..modeling import MESwitchModelForCausalLM
from ..module_kinds import is_conv1d
from ..verification.evidence import tensors_digest
from ..verification.inputs import Inputs, folder_of, open_inputs
from .sequences import collate, schedule, sequences_of, split
from .split_model import OutputHead, hidden_states
from .training import Distillation, DistillationBatch
from .weights import TRAINABLE, TrainedDelta

__all__ = ["DistillationReport", "DistillationSettings", "distill", "distill_with_report"]

_SEED = 0
#: Steps between two saves of where the training is.
_SAVE_EVERY = 25
#: In the work folder: the expert's hidden states, and where the training is.
_HIDDEN, _STATE = "hidden.safetensors", "state.safetensors"
#: Name of the delta on the base.
_DELTA = "delta"
#: Cosine between the delta of an expert and what is stored. Of one's own expert it is above 0.6 even at one bit.
_UNRELATED = 0.05


@dataclass(frozen=True)
class DistillationSettings:
    """How to train; see :func:`distill`.

    Raises:
        DistillationError: a number out of range.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 1e-2
    max_calibration_tokens: int = 65536

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_calibration_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DistillationError(f"{name} is {value!r}, expected an integer of at least 1.")
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise DistillationError(f"learning_rate is {rate!r}, expected a number above 0.")


@dataclass(frozen=True)
class DistillationReport:
    """What came of a distillation.

    Attributes:
        output: the delta repo that was written.
        steps: steps of the optimiser.
        text: what was trained on, and how much of it.
        held_out_tokens: tokens that both divergences are means over; they were not trained on.
        kl_before: KL(expert ‖ base + delta) of the delta that was read, nats a token.
        kl_after: that of the trained one.
    """

    output: Path
    steps: int
    text: str
    held_out_tokens: int
    kl_before: float
    kl_after: float

    @property
    def improved(self) -> bool:
        """Whether the trained steps were written; else the delta is the one that was read."""
        return self.kl_after < self.kl_before


def distill(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    calibration: Calibration = DEFAULT,
    *,
    steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    max_calibration_tokens: int = 65536,
    device: torch.device | str | None = None,
    base_revision: str | None = None,
    expert_revision: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """Train the step sizes and salient columns of a delta on its expert's logits.

    Codes, embeddings, norms and biases stay as they are, and so does every byte of the size. What is minimised is
    KL(expert ‖ base + delta) over all tokens of the calibration text, as in BitDelta (arXiv 2402.10193, section 3.1)
    and ME-Switch (arXiv 2406.09041, section 3.2), which take the mean square difference of the logits. A quarter of
    the text is held out; if training did not bring the delta nearer to the expert there, the delta that was read is
    written as it was.

    The expert runs first; its last hidden states (``max_calibration_tokens`` × width numbers) wait in
    ``<output_dir>.partial``. Then the base and the delta are loaded, with the expert's output head, and trained: one
    full model is in memory at a time. A run that was killed is taken up by the same call at the last multiple of 25
    steps. On a CPU it ends with the very bytes of one that was not; on an accelerator as far as two runs are equal
    there, where attention may sum its gradients in any order.

    Args:
        base: folder or Hub id of the base's checkpoint.
        expert: folder or Hub id of the fine-tune's.
        delta: folder or Hub id of the delta repo.
        output_dir: folder of the new delta repo, made if need be; a delta in it is replaced once the new one is
            complete.
        calibration: what the expert typically sees, prompts and answers; see
            :func:`~transformers_meswitch.compression.calibration.read_samples`.
        steps: steps of the optimiser.
        batch_size: sequences a step.
        learning_rate: of the first step; it falls to zero along a cosine.
        max_calibration_tokens: how much of the calibration text to take at most.
        device: where to train; by default a CUDA device if there is one.
        base_revision: branch, tag or commit of the base; by default what the delta names, if it names this base.
        expert_revision: branch, tag or commit of the expert.
        revision: branch, tag or commit of the delta repo.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        progress: whether to show progress bars.

    Returns:
        ``output_dir``.

    Raises:
        BaseMismatchError: the delta was formed against another base.
        CheckpointError: a missing, truncated or unreadable checkpoint.
        CompressionError: text or a device that cannot be used; an output folder that is one of the inputs, holds a
            model, or that another process works on; a quantised checkpoint.
        DeltaFormatError: the delta is malformed.
        DistillationError: a number out of range; the delta is of another expert, or holds no linear layer; too little
            text; a disk that is full; a loss that is no number.
        UnsupportedModelError: a model that makes its logits of more than its last hidden states.
    """
    settings = DistillationSettings(steps, batch_size, learning_rate, max_calibration_tokens)
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    revisions = {"base_revision": base_revision, "expert_revision": expert_revision, "revision": revision}
    return distill_with_report(
        base, expert, delta, output_dir, calibration, settings, device=device, progress=progress, **revisions, **hub
    ).output


def distill_with_report(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    calibration: Calibration,
    settings: DistillationSettings,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    **located: Any,
) -> DistillationReport:
    """:func:`distill`, which tells what came of it.

    Args:
        base: as there, as are all that follow.
        expert: see there.
        delta: see there.
        output_dir: see there.
        calibration: see there.
        settings: how to train.
        device: see there.
        progress: see there.
        **located: revisions, and how to reach the Hub, see :func:`~..verification.inputs.open_inputs`.

    Raises:
        MESwitchError: as there.
    """
    check_request(base, expert, output_dir, MESwitchConfig(), calibration)
    output = Path(os.path.abspath(output_dir))
    if Path(delta).exists() and Path(delta).resolve() == output.resolve():
        raise DistillationError(f"output_dir is the delta's own folder {output}; give another.")
    where = usable(device)
    inputs = open_inputs(base, expert, delta, **located)
    opened = inputs.delta
    check_same_computation(inputs.base, inputs.expert.location, inputs.expert.config)
    vocab_size = _check_expert(inputs)

    text = calibration_text(inputs.expert, calibration, vocab_size, settings.max_calibration_tokens)
    sequences = sequences_of(text)
    if len(sequences) < 2:
        raise DistillationError(
            "The calibration text is one sample, expected at least 2, of which one is held out. Give a few hundred "
            'samples of what the expert is asked and answers, or calibration="default" for the built-in set.'
        )
    used = f"{describe(calibration)}: {text.samples:,} samples, {text.tokens:,} tokens"
    license = license_of(opened.files.location, inputs.expert.location, inputs.base.location)  # type: ignore[arg-type]
    stated = inputs.base.config.dtype
    # On a CPU half precision is slower where it is not missing; gradients of 1e-8 are zero in float16.
    dtype = torch.float32 if where.type == "cpu" or stated in (None, torch.float32) else torch.bfloat16
    request = {
        "task": "distill",
        "base": source_identity(inputs.base),
        "expert": source_identity(inputs.expert),
        "delta": {"config": opened.config.to_dict(), "tensors": tensors_digest(opened.tensors())},
        "calibration": text.digest(),
        "settings": dataclasses.asdict(settings),
        "device": where.type,
        "versions": versions(),
    }
    with disk_errors(output, DistillationError), request_folder(output, request) as folder:
        if progress:
            tqdm.write(f"Distilling on {used}", file=sys.stderr)
        head = _run_expert(inputs.expert, sequences, folder / _HIDDEN, where, dtype, progress)
        gc.collect()  # the expert's memory is wanted for the base
        report, trained = _train(inputs, sequences, settings, folder, head, where, dtype, progress)
        report = dataclasses.replace(report, output=Path(output_dir), text=used)
        config, tensors = opened.config, opened.tensors()
        if report.improved:
            tensors |= trained
            distilled = {
                "steps": report.steps,
                "text": used,
                "kl_before": report.kl_before,
                "kl_after": report.kl_after,
            }
            config = dataclasses.replace(config, distilled=distilled)
        # What an earlier version can hold means the same in this one.
        config = dataclasses.replace(config, format_version=FORMAT_VERSION)
        assets = find_assets(opened.files.location)  # type: ignore[arg-type]
        directory = write_delta(output_dir, config, tensors, assets)
        dense_bytes = full_copy_bytes(config, inputs.expert.config)
        write_delta_card(directory, config, dense_bytes=dense_bytes, license=license)
    return report


def _check_expert(inputs: Inputs) -> int:
    """Make sure that a delta is of this expert, before anything is run; returns the size of its vocabulary.

    Raises:
        DistillationError: it is not, or it holds no linear layer.
    """
    delta, location = inputs.delta, inputs.expert.location
    model = meta_model(inputs.expert.config)
    base = CheckpointParameters(meta_model(inputs.base.config), inputs.base.checkpoint)
    expert = CheckpointParameters(model, inputs.expert.checkpoint)
    vocab_size = expert.shapes(input_embedding(model))["weight"][0]
    if delta.config.vocab_size not in (None, vocab_size):
        raise DistillationError(
            f"{location} has a vocabulary of {vocab_size} tokens, and the delta is of an expert with "
            f"{delta.config.vocab_size}: it is not this expert's."
        )
    linears = {name: record for name, record in delta.records.items() if isinstance(record, LinearRecord)}
    if not linears:
        raise DistillationError("The delta holds no linear layer, so it has no steps to train.")
    for name, record in linears.items():
        if name not in expert.modules or sorted(expert.shapes(name)["weight"]) != sorted(
            (record.out_features, record.in_features)
        ):
            raise DistillationError(
                f"The delta has a linear layer {name} of {record.out_features} × {record.in_features}, which "
                f"{location} has not: it is not this expert's."
            )
    names = list(linears)
    cosines = []
    for name in {names[0], names[len(names) // 2], names[-1]}:
        exact = expert.of(name)["weight"].float() - base.of(name)["weight"].float()
        leaves = {leaf: delta.tensor(tensor_key(name, leaf)) for leaf in linears[name].leaves()}
        stored = reconstruct_linear(linears[name], leaves)
        exact = exact.T if is_conv1d(model.get_submodule(name)) else exact
        cosines.append(float((exact * stored).sum() / (exact.norm() * stored.norm()).clamp_min(1e-30)))
    if max(cosines) < _UNRELATED:
        raise DistillationError(
            f"The delta is not of {location}: the cosine between what that changed in its linear layers and what the "
            f"delta stores is {max(cosines):.3f} at most, expected above {_UNRELATED}. Give the fine-tune that was "
            "compressed."
        )
    return vocab_size


def _run_expert(
    expert: Source,
    sequences: Sequence[Tensor],
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
) -> OutputHead:
    """Write the expert's last hidden states of each sequence, unless that is done; its output head is returned."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder_of(expert), dtype=dtype).eval()
    if not path.exists():
        model.to(device)
        found: dict[str, Tensor] = {}
        todo = list(collate(sequences, range(len(sequences))))
        for rows, ids, real in tqdm(todo, desc="Running the expert", unit="batch", disable=not progress):
            with torch.no_grad():
                hidden = hidden_states(model, ids, real)
            if not bool(hidden.isfinite().all()):
                raise DistillationError(
                    f"{expert.location} gives hidden states that are not finite in {dtype}. Its weights are damaged, "
                    "or it overflows on this text; give other text."
                )
            parts = hidden.cpu().split([len(sequences[row]) for row in rows])
            found |= {str(row): part.contiguous() for row, part in zip(rows, parts, strict=True)}
        write_whole(path, found, {})
    head = OutputHead(model)
    del model
    return head.to(device)


def _train(
    inputs: Inputs,
    sequences: Sequence[Tensor],
    settings: DistillationSettings,
    folder: Path,
    head: OutputHead,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
) -> tuple[DistillationReport, dict[str, Tensor]]:
    """Train, from where an earlier run of the same request stopped; and the trained tensors by name on disk."""
    model, deltas = _student(inputs.base, inputs.delta, device, dtype)
    training = Distillation(model, deltas, head, steps=settings.steps, learning_rate=settings.learning_rate)
    numbers, held_out = split(len(sequences))
    with safe_open(folder / _HIDDEN, framework="pt") as file:

        def batches(chosen: Sequence[int]) -> list[DistillationBatch]:
            return [
                DistillationBatch(ids, real, torch.cat([file.get_tensor(str(row)) for row in rows]))
                for rows, ids, real in collate(sequences, chosen)
            ]

        before = training.evaluate(batches(held_out))
        if not math.isfinite(before):
            raise DistillationError(
                f"The delta's divergence from the expert is {before} in {dtype}, expected a finite number. Verify the "
                "delta with `meswitch verify`."
            )
        if (folder / _STATE).exists():
            with safe_open(folder / _STATE, framework="pt") as state:
                names = state.keys()  # the file itself cannot be iterated over
                training.load_state({name: state.get_tensor(name) for name in names}, int(state.metadata()["done"]))
            if progress:
                tqdm.write(f"Resuming: {training.done} steps were finished before", file=sys.stderr)
        plan = schedule(numbers, settings.steps, settings.batch_size, _SEED)
        bar = tqdm(total=settings.steps, initial=training.done, desc="Distilling", unit="step", disable=not progress)
        with bar:
            for chosen in plan[training.done :]:
                loss = training.step(batches(chosen))
                bar.update()
                bar.set_postfix_str(f"KL {loss:.3g}")
                if training.done % _SAVE_EVERY == 0:
                    write_whole(folder / _STATE, training.state(), {"done": str(training.done)})
        after = training.evaluate(batches(held_out))
    tensors = {
        tensor_key(name, leaf): tensor.cpu()
        for name, delta in deltas.items()
        for leaf, tensor in delta.leaves().items()
        if leaf in ("step", "column_step", "salient")
    }
    tokens = sum(len(sequences[number]) for number in held_out)
    return DistillationReport(folder, settings.steps, "", tokens, before, after), tensors


def _student(
    base: Source, delta: Delta, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, TrainedDelta]]:
    """The base with the delta, whose linears are trained."""
    model: Any = MESwitchModelForCausalLM.from_pretrained(
        folder_of(base), experts={_DELTA: str(delta.files.directory)}, dtype=dtype
    )
    model.to(device).eval()
    model.set_expert(_DELTA)
    deltas = {}
    for name, record in delta.records.items():
        if isinstance(record, LinearRecord):
            layer = model.get_submodule(name)
            stored = dict(layer.stored_delta(_DELTA).named_parameters(recurse=False))
            deltas[name] = TrainedDelta(record, stored, TRAINABLE)
            layer.stand_in(_DELTA, deltas[name])
    return model, deltas
