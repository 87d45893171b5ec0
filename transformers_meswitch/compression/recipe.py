"""From two checkpoints to a delta repo, streamed: one pair of modules in memory at a time, and resumable."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from ..cards import write_delta_card
from ..configuration import MESwitchConfig, MESwitchExpertConfig
from ..delta_format.fingerprint import fingerprint_checkpoint
from ..delta_format.location import RepoLocation
from ..delta_format.spec import ModuleRecord
from ..delta_format.tensor_files import TensorFiles
from ..delta_format.writer import write_delta
from ..errors import CheckpointError, CompressionError
from ..inspection import full_copy_bytes
from ..module_kinds import module_kinds
from .architecture import check_same_computation
from .assets import GENERATION_CONFIG, find_assets, generation_config_of, license_of
from .batches import CalibrationBatches, hold_out, spread, tokenize
from .calibration import DEFAULT, Calibration, describe, read_samples
from .calibration_record import calibration_record
from .candidates import CandidateFits
from .delta_parameters import DeltaParameters
from .driver import Budget, compress_expert
from .held_out import HELD_OUT_EVERY, HELD_OUT_TOKENS, HeldOutDivergence
from .layerwise import LayerwiseMoments, SecondMoments
from .partly_compressed import PartlyCompressed
from .read_ahead import ReadAhead
from .refit import refit_chosen
from .request import check_layer_bits, check_request
from .sequential import SequentialStatistics
from .sources import CheckpointParameters, Source, check_unknown, input_embedding, locate, meta_model
from .spending import Allocation, spend
from .work_folder import disk_errors, work_folder

__all__ = ["calibration_text", "compress", "source_identity", "usable", "versions", "write_repo"]

#: Calibration tokens at most on which a budget measures what errors do to a layer's output.
_PROBE_TOKENS = 2048


def compress(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    config: MESwitchConfig | None = None,
    calibration: Calibration | None = DEFAULT,
    *,
    expert_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
    max_calibration_tokens: int = 65536,
    progress: bool = True,
    on_allocation: Callable[[Allocation], object] | None = None,
    full_fingerprint: bool = False,
) -> Path:
    """Compress a full fine-tune into a delta repo.

    The checkpoints are read module by module, and finished modules are written to ``<output_dir>.partial``, so neither
    a checkpoint nor the delta is ever in memory. Calibration runs the expert decoder layer by decoder layer (in
    float32 on a CPU) and holds the hidden states of the calibration tokens, see :mod:`.layerwise`.

    A run that was killed is taken up where it stopped by the same call: finished modules are read from
    ``<output_dir>.partial``, and hidden states are worked out again by running the layers before, which is the cheaper
    part of a layer and leaves nothing large on the disk. The same call is one with the same bytes of base and expert,
    config, calibration tokens, kind of device and versions; any other begins anew.

    With a budget in the config, all candidates of a linear are fitted while its second moments are in memory, and wait
    in the work folder for the choice, which takes 16 bits a weight of disk, see :mod:`.candidates`.

    Args:
        base: folder or Hub id of the base's checkpoint (safetensors, sharded or not).
        expert: folder or Hub id of the fine-tune's.
        output_dir: folder of the delta repo, made if need be; a delta in it is replaced once the new one is complete.
        config: bits, salient channels, column steps, and the base's revision.
        calibration: text to choose salient channels and step sizes by the layer's output error (ME-Switch's
            criterion), by default the built-in set, ``"default"``; `None` goes by the weight error. See
            :func:`~transformers_meswitch.compression.calibration.read_samples`.
        expert_revision: branch, tag or commit of the expert.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        device: where to compute; by default a CUDA device if there is one.
        max_calibration_tokens: how much of the calibration text to run at most.
        progress: whether to show progress bars.
        on_allocation: given what a budget chose, once it is chosen.
        full_fingerprint: record a fingerprint of every byte of the base too, which ``verify(full_fingerprint=True)``
            compares. Loading a delta compares samples.

    Returns:
        ``output_dir``.

    Raises:
        CheckpointError: a missing, truncated or unreadable checkpoint.
        CompressionError: the expert is of another architecture than the base, equals it, is quantised, or holds NaN or
            infinite weights, or differs from it in more than weights; calibration text or a device that cannot be
            used; an output folder that holds a model, cannot be written to, or that another process works on; a disk
            that is full; a pattern of ``layer_bits`` that matches no linear layer or embedding.
        BudgetError: no delta keeps the budget. The fits stay in ``<output_dir>.partial``, for a call with another.
        UnsupportedModelError: a layer that deltas cannot express.
    """
    config = config if config is not None else MESwitchConfig()
    check_request(base, expert, output_dir, config, calibration)
    where = usable(device)

    def located(repo: str | os.PathLike[str], revision: str | None) -> Source:
        return locate(
            RepoLocation(os.fspath(repo), revision, None, token, cache_dir, local_files_only, error=CheckpointError)
        )

    base_source = located(base, config.base_revision)
    expert_source = located(expert, expert_revision)
    expert_location, model_config = expert_source.location, expert_source.config
    check_same_computation(base_source, expert_location, model_config)
    model = meta_model(model_config)
    # Before calibration, which may take long; for the other producers, the loop over the modules checks it.
    check_layer_bits(config, [name for name, kind in module_kinds(model).items() if kind in ("linear", "rows")])
    base_parameters = CheckpointParameters(meta_model(base_source.config), base_source.checkpoint)
    expert_parameters = CheckpointParameters(model, expert_source.checkpoint)
    check_unknown(base_parameters, expert_parameters)

    generation_config = generation_config_of(expert_location, model_config)
    license = license_of(expert_location, base_source.location)  # before the work, which a failure here would lose
    text = fitted_on = drifts = used = divergence = record = None
    moments: SecondMoments | None = None
    run: dict[str, Any] = {"device": where, "progress": progress}
    if calibration is not None:
        vocab_size = expert_parameters.shapes(input_embedding(model))["weight"][0]
        text = calibration_text(expert_source, calibration, vocab_size, max_calibration_tokens)
        record = calibration_record(calibration, text.samples)
        used = f"{describe(calibration)}: {text.samples:,} samples, {text.tokens:,} tokens"
        # On a CPU, half precision is slower than float32, where it is not missing.
        run["dtype"] = torch.float32 if where.type == "cpu" else model_config.dtype or torch.float32
        fitted_on = text
        if config.max_kl is not None:
            fitted_on, apart = hold_out(text, HELD_OUT_EVERY, HELD_OUT_TOKENS)
            divergence = HeldOutDivergence(model_config, expert_parameters, apart, **run)
            used += f", {apart.tokens:,} of them kept apart to measure on"
    output = Path(os.path.abspath(output_dir))
    request = _request(base_source, expert_source, config, text, where)
    with (
        disk_errors(output, CompressionError),
        work_folder(output, request) as work,
        ReadAhead(base_parameters) as base_ahead,
        ReadAhead(expert_parameters) as expert_ahead,
    ):
        if progress:
            _report(used, len({*work.records, *work.candidates}))
        allocations: list[Allocation] = []

        def measure() -> float:
            assert divergence is not None
            made = DeltaParameters(model, base_parameters, expert_parameters, work.records, work.tensors())
            return divergence.measure(made)

        def spend_budget(describe: Callable[[], MESwitchExpertConfig]) -> None:
            allocations.append(spend(config, work, describe, measure))

        def read(name: str) -> tuple[ModuleRecord, dict[str, Tensor]]:
            # To the device, where those of this run are: the sums with the base are to have the same bits.
            record, leaves = work.read(name)
            return record, {leaf: tensor.to(where) for leaf, tensor in leaves.items()}

        def in_turn(text: CalibrationBatches, finished: Collection[str]) -> SequentialStatistics:
            so_far = PartlyCompressed(model, base_parameters, expert_parameters, finished, read)
            return SequentialStatistics(model_config, expert_parameters, so_far, text, **run)

        def refit(text: CalibrationBatches) -> None:
            refit_chosen(
                model,
                base_ahead,
                expert_ahead,
                config,
                work,
                partial(in_turn, text),
                device=where,
                progress=progress,
            )
            if divergence is not None:
                before, after = allocations[-1].kl, measure()
                if before is not None and after > before:
                    work.drop_refits()
                else:
                    allocations[-1] = replace(allocations[-1], kl=after)

        budget = None
        if config.budget is not None:
            fits = CandidateFits(config, work)
            if fitted_on is not None:
                probe = spread(fitted_on.batches, _PROBE_TOKENS)
                moments = LayerwiseMoments(model_config, expert_parameters, fitted_on, probe=probe, **run)
                fits = CandidateFits(config, work, moments.damage)
            budget = Budget(fits, spend_budget, None if fitted_on is None else partial(refit, fitted_on))
        elif fitted_on is not None:
            moments = drifts = in_turn(fitted_on, work.records)
        delta_config = compress_expert(
            model,
            base_source,
            base_ahead,
            expert_location,
            expert_ahead,
            config,
            work,
            generation_config=generation_config,
            second_moments=moments,
            drifts=drifts,
            budget=budget,
            full_fingerprint=full_fingerprint,
            calibration=record,
            device=where,
            progress=progress,
        )
        for allocation in allocations:
            if progress:
                tqdm.write(f"Budget: {allocation}", file=sys.stderr)
            if on_allocation is not None:
                on_allocation(allocation)
        return write_repo(
            output_dir,
            delta_config,
            work.tensors(),
            assets_of=expert_location,
            generation_config=generation_config,
            model_config=model_config,
            license=license,
            calibration=used,
            kl=next((allocation.kl for allocation in allocations), None),
        )


def write_repo(
    output_dir: str | os.PathLike[str],
    config: MESwitchExpertConfig,
    tensors: TensorFiles,
    *,
    assets_of: RepoLocation | None,
    generation_config: GenerationConfig,
    model_config: PreTrainedConfig,
    license: str | None,
    calibration: str | None = None,
    kl: float | None = None,
) -> Path:
    """Write the delta repo of an expert: the delta, what comes along with it, and its card.

    Args:
        output_dir: the folder, made if need be.
        config: its ``adapter_config.json``.
        tensors: the delta's tensors, read one at a time.
        assets_of: the repo whose tokenizer, chat templates and generation config come along; `None` brings none.
        generation_config: the expert's, written where no file of it comes along.
        model_config: configuration of the expert or of the base.
        license: Hub licence identifier, where known.
        calibration: which text was calibrated on and how much of it, where any was.
        kl: KL divergence from the expert that was measured, nats a token.

    Returns:
        ``output_dir``.

    Raises:
        MESwitchError: as :func:`~..delta_format.writer.write_delta`.
        OSError: the disk is full or not writable.
    """
    assets, texts = [] if assets_of is None else find_assets(assets_of), {}
    if all(path.name != GENERATION_CONFIG for path in assets):
        texts[GENERATION_CONFIG] = generation_config.to_json_string()
    directory = write_delta(output_dir, config, tensors, assets, texts=texts)
    dense_bytes = full_copy_bytes(config, model_config)
    write_delta_card(directory, config, dense_bytes=dense_bytes, license=license, calibration=calibration, kl=kl)
    return directory


def _report(calibration: str | None, finished: int) -> None:
    """Say on standard error what is done with."""
    if calibration is not None:
        tqdm.write(f"Calibrating on {calibration}", file=sys.stderr)
    if finished:
        tqdm.write(f"Resuming: {finished} modules were finished before", file=sys.stderr)


def _request(
    base: Source,
    expert: Source,
    config: MESwitchConfig,
    text: CalibrationBatches | None,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that determines the tensors of a delta, or, with a budget, of its candidates."""
    kind = None if config.budget is None else config.budget[0]
    # What is fitted does not depend on how much may be spent, only on which text is kept apart to measure on.
    unspent = {"target_bits": None, "target_size": None, "max_kl": None}
    budget = None if kind is None else "measured" if kind == "max_kl" else "counted"
    return {
        "base": source_identity(base),
        "expert": source_identity(expert),
        "config": config.to_dict() | unspent | {"budget": budget},
        "calibration": None if text is None else text.digest(),
        # A folder from before they were holds other fits.
        "fit": "linears in turn",
        "device": device.type,
        "versions": versions(),
    }


def source_identity(source: Source) -> dict[str, Any]:
    """What tells a checkpoint from another, or from the same one after a change, as JSON."""
    files = [path.stat() for path in source.checkpoint.paths]
    return {
        "config": source.config.to_dict(),
        "fingerprint": fingerprint_checkpoint(source.checkpoint.paths)["digest"],
        # The fingerprint looks at a part of each tensor.
        "files": [[file.st_size, file.st_mtime_ns] for file in files],
    }


def versions() -> dict[str, str]:
    """Versions of what computes: package to version."""
    from .. import __version__

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformers_meswitch": __version__,
    }


def usable(device: torch.device | str | None) -> torch.device:
    """The device asked for, else a CUDA device if there is one, else the CPU.

    Raises:
        CompressionError: it cannot be used here.
    """
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise CompressionError(
            f"device is {device!r}, which cannot be used here: {error}. Leave it out to take what there is."
        ) from error
    return where


def calibration_text(source: Source, calibration: Calibration, vocab_size: int, max_tokens: int) -> CalibrationBatches:
    """A calibration set in an expert's tokens.

    Args:
        source: the expert's files.
        calibration: the set, see :func:`~.calibration.read_samples`.
        vocab_size: rows of the expert's input embedding.
        max_tokens: how many tokens to take at most.

    Raises:
        CompressionError: text that cannot be read or has too few tokens; a tokenizer that is missing or of another
            model.
    """
    expert = source.location
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            expert.repo,
            trust_remote_code=False,
            revision=expert.revision,
            token=expert.token,
            cache_dir=expert.cache_dir,
            local_files_only=expert.local_files_only,
        )
    except (OSError, ValueError) as error:
        raise CompressionError(
            f"Calibration needs the tokenizer of {expert}, which cannot be read: {error} Save the expert's tokenizer "
            "beside its weights; or do without calibration, which costs accuracy: calibration=None, on the command "
            "line --calibration none."
        ) from error
    return tokenize(
        tokenizer,
        read_samples(calibration, tokenizer),
        max_tokens=max_tokens,
        vocab_size=vocab_size,
        max_positions=getattr(source.config.get_text_config(), "max_position_embeddings", None),
    )
