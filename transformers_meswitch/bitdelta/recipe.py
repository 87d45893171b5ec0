"""``import_bitdelta``: from a base and a BitDelta diff to a delta repo that computes the same."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..compression.architecture import check_same_computation
from ..compression.assets import generation_config_of, license_of
from ..compression.driver import compress_expert, write_behind
from ..compression.recipe import source_identity, versions, write_repo
from ..compression.request import check_request
from ..compression.sources import CheckpointParameters, input_embedding, locate, meta_model, output_head, read_config
from ..compression.work_folder import disk_errors, work_folder
from ..configuration import MESwitchConfig
from ..delta_format.location import RepoLocation
from ..errors import BitDeltaError, CheckpointError, CompressionError
from .diff import sort_diff
from .diff_file import read_diff
from .expert import DiffParameters, linear_modules

__all__ = ["import_bitdelta"]


def import_bitdelta(
    base: str | os.PathLike[str],
    diff: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    expert: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    expert_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """Write a delta repo of a diff that BitDelta (arXiv 2402.10193) made, without loss.

    Base + delta is what BitDelta's own ``load_diff`` makes of a base that is loaded in the dtype of its checkpoint,
    bit for bit: coefficients are rounded to that dtype, as it does; embeddings, output head and norms are the diff's,
    cast to it, and only rows that differ from the base's are stored. Where the base's output head is its input
    embedding and the diff holds no head, the head follows the diff's embedding, as when the fine-tune was trained;
    ``load_diff`` leaves it the base's until the model is saved and loaded again.

    The diff is read as tensors alone (``weights_only``) and mapped, not loaded; of the base's linears only headers are
    read, and finished modules wait in ``<output_dir>.partial``. A run that was killed is taken up by the same call.

    Args:
        base: folder or Hub id of the base's checkpoint (safetensors, sharded or not).
        diff: the file that BitDelta's ``save_diff`` wrote, ``diff.pt``.
        output_dir: folder of the delta repo, made if need be; a delta in it is replaced once the new one is complete.
        expert: folder or Hub id of the fine-tune that the diff was made from, which a diff holds only the weights of:
            its tokenizer, chat template and generation config are taken over, and its ``config.json`` is compared with
            the base's. None of its weights are read. Without it the delta has the base's.
        base_revision: branch, tag or commit of the base.
        expert_revision: branch, tag or commit of the expert.
        token: Hub token, or whether to use the stored one.
        cache_dir: the Hub cache to use.
        local_files_only: never use the network.
        progress: whether to show progress bars.

    Returns:
        ``output_dir``.

    Raises:
        BitDeltaError: the file is no BitDelta diff, is damaged, holds anything but tensors, or does not fit the base.
        CheckpointError: a missing, truncated or unreadable checkpoint of the base, or configuration of the expert.
        CompressionError: the base is quantised; NaN or infinite weights; the expert differs from the base in more than
            weights; the diff changes nothing; an output folder that holds a model, cannot be written to, or that
            another process works on; a disk that is full.
        UnsupportedModelError: a layer that deltas cannot express.
    """
    config = MESwitchConfig(bits=1, salient_channels=0, embedding_bits=None)
    check_request(base, base if expert is None else expert, output_dir, config, None)
    download: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    source = locate(RepoLocation(os.fspath(base), base_revision, None, **download, error=CheckpointError))
    origin, model_config = source.location, source.config
    if expert is not None:
        located = RepoLocation(os.fspath(expert), expert_revision, None, **download, error=CheckpointError)
        origin, model_config = read_config(located)
        check_same_computation(source, origin, model_config)

    base_model = meta_model(source.config)
    embedding = input_embedding(base_model)
    base_parameters = CheckpointParameters(base_model, source.checkpoint)
    found = sort_diff(read_diff(diff), diff, base_parameters, base_model)
    parameters = DiffParameters(base_parameters, found, embedding, output_head(base_model))
    if expert is not None:
        _check_vocabulary(diff, parameters.shapes(embedding)["weight"][0], origin, model_config)
    generation_config = generation_config_of(origin, model_config)
    license = license_of(origin, source.location)

    output, file = Path(os.path.abspath(output_dir)), Path(diff).resolve()
    request = {
        "task": "import-bitdelta",
        "base": source_identity(source),
        "diff": [str(file), file.stat().st_size, file.stat().st_mtime_ns],
        "versions": versions(),
    }
    with disk_errors(output, CompressionError), work_folder(output, request) as work:
        write_behind(linear_modules(found, frozenset(work.records), progress=progress), work)
        delta_config = compress_expert(
            meta_model(model_config),
            source,
            base_parameters,
            origin if expert is not None else RepoLocation(str(file)),
            parameters,
            config,
            work,
            generation_config=generation_config,
            progress=progress,
        )
        return write_repo(
            output_dir,
            dataclasses.replace(delta_config, saliency=None, imported_from="BitDelta"),
            work.tensors(),
            assets_of=origin if expert is not None else None,
            generation_config=generation_config,
            model_config=model_config,
            license=license,
        )


def _check_vocabulary(
    diff: str | os.PathLike[str], rows: int, expert: RepoLocation, model_config: PreTrainedConfig
) -> None:
    stated = model_config.get_text_config().vocab_size
    if stated != rows:
        raise BitDeltaError(
            f"{os.fspath(diff)} makes an expert with {rows} tokens, and {expert} has a vocabulary of {stated}: the "
            "diff is not this expert's. Give the fine-tune that it was made from, or none."
        )
