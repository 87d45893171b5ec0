"""From two checkpoints to a delta repo, streamed: one pair of modules in memory at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..cards import write_delta_card
from ..configuration import MESwitchConfig
from ..delta_format.location import RepoLocation
from ..delta_format.writer import write_delta
from ..errors import CheckpointError, CompressionError
from ..inspection import full_copy_bytes
from ..module_kinds import module_kinds
from .architecture import check_same_computation
from .assets import GENERATION_CONFIG, find_assets, generation_config_of, license_of
from .calibration import Calibration, collect_second_moments, read_samples
from .driver import compress_expert
from .request import check_layer_bits, check_request
from .sources import CheckpointParameters, Source, check_unknown, locate, meta_model

__all__ = ["compress"]


def compress(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    config: MESwitchConfig | None = None,
    calibration: Calibration | None = None,
    *,
    expert_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
    max_calibration_tokens: int = 65536,
    progress: bool = True,
) -> Path:
    """Compress a full fine-tune into a delta repo.

    The checkpoints are read module by module; the memory needed is one pair of modules and the delta. Calibration runs
    the whole expert once before that, and needs it in memory (in float32 on a CPU).

    Args:
        base: folder or Hub id of the base's checkpoint (safetensors, sharded or not).
        expert: folder or Hub id of the fine-tune's.
        output_dir: folder of the delta repo, made if need be; a delta in it is replaced once the new one is complete.
        config: bits, salient channels, column steps, and the base's revision.
        calibration: text to choose salient channels and step sizes by the layer's output error (ME-Switch's
            criterion); `None` goes by the weight error. See
            :func:`~transformers_meswitch.compression.calibration.read_samples`.
        expert_revision: branch, tag or commit of the expert.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        device: where to compute; by default a CUDA device if there is one.
        max_calibration_tokens: how much of the calibration text to run at most.
        progress: whether to show progress bars.

    Returns:
        ``output_dir``.

    Raises:
        CheckpointError: a missing, truncated or unreadable checkpoint.
        CompressionError: the expert is of another architecture than the base, equals it, is quantised, or holds NaN or
            infinite weights, or differs from it in more than weights; calibration text or a device that cannot be
            used; an output folder that holds a model or cannot be written to; a pattern of ``layer_bits`` that matches
            no linear layer or embedding.
        UnsupportedModelError: a layer that deltas cannot express.
    """
    config = config if config is not None else MESwitchConfig()
    check_request(base, expert, output_dir, config, calibration)
    where = _usable(device)

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
    moments = None
    if calibration is not None:
        moments = _calibrate(expert_location, calibration, where, max_calibration_tokens, progress)
    delta_config, tensors = compress_expert(
        model,
        base_source,
        base_parameters,
        expert_location,
        expert_parameters,
        config,
        generation_config=generation_config,
        second_moments=moments,
        device=where,
        progress=progress,
    )
    assets, texts = find_assets(expert_location), {}
    if all(path.name != GENERATION_CONFIG for path in assets):
        texts[GENERATION_CONFIG] = generation_config.to_json_string()
    directory = write_delta(output_dir, delta_config, tensors, assets, texts=texts)
    write_delta_card(
        directory,
        delta_config,
        dense_bytes=full_copy_bytes(delta_config, model_config),
        license=license,
    )
    return directory


def _usable(device: torch.device | str | None) -> torch.device:
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise CompressionError(
            f"device is {device!r}, which cannot be used here: {error}. Leave it out to take what there is."
        ) from error
    return where


def _calibrate(
    expert: RepoLocation, calibration: Calibration, device: torch.device, max_tokens: int, progress: bool
) -> dict[str, Tensor]:
    where: dict[str, Any] = {
        "revision": expert.revision,
        "token": expert.token,
        "cache_dir": expert.cache_dir,
        "local_files_only": expert.local_files_only,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(expert.repo, trust_remote_code=False, **where)
    except (OSError, ValueError) as error:
        raise CompressionError(
            f"Calibration needs the tokenizer of {expert}, which cannot be read: {error}"
        ) from error
    samples = read_samples(calibration, tokenizer)
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(expert.repo, dtype=dtype, trust_remote_code=False, **where).eval()
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of .to() hides its signature
    return collect_second_moments(model, tokenizer, samples, max_tokens=max_tokens, progress=progress)
