"""What is wrong with a request to compress, as far as it can be known before hours of work."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..configuration import MESwitchConfig
from ..errors import CompressionError
from ..text_rows import check_rows
from .calibration import DEFAULT, Calibration
from .expert_config import portable_name

__all__ = ["check_layer_bits", "check_request"]

#: Enough names to see how a model spells them.
_NAMES_SHOWN = 8


def check_request(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    config: MESwitchConfig,
    calibration: Calibration | None,
) -> None:
    """Check the arguments of :func:`~transformers_meswitch.compress` without reading a model; leaves no trace on disk.

    Raises:
        CompressionError: an argument of another type; the config names another base, or asks for what takes text; the
            output folder is one of the
            inputs, holds a model, or cannot be written; the calibration file cannot be read or is of no known kind; a
            data set needs a package that is not installed.
    """
    if not isinstance(config, MESwitchConfig):
        raise CompressionError(f"config is a {type(config).__name__}, expected a MESwitchConfig.")
    for what, repo in (("base", base), ("expert", expert)):
        if not isinstance(repo, str | os.PathLike) or not os.fspath(repo):
            raise CompressionError(f"The {what} is {repo!r}, expected a Hub id or a folder.")
    stated = config.base_model_name_or_path
    if stated is not None and portable_name(stated) != portable_name(base):
        raise CompressionError(f"The base is {os.fspath(base)!r}, but the config names {os.fspath(stated)!r}.")
    if config.max_kl is not None and calibration is None:
        raise CompressionError(
            f"max_kl={config.max_kl:g} is measured on calibration text, and there is none. Give some (on the command "
            "line, leave --calibration none out), or target_bits or target_size."
        )
    output = Path(output_dir).resolve()
    for what, repo in (("base", base), ("expert", expert)):
        if output == Path(repo).resolve():
            raise CompressionError(f"output_dir is the {what}'s own folder {output}; give another.")
    if (output / "config.json").exists():
        raise CompressionError(
            f"{output} holds a config.json, so transformers would take it for a full model and not for a delta; "
            "give another output_dir."
        )
    _check_writable(output)
    if isinstance(calibration, str | os.PathLike) and calibration != DEFAULT:
        check_rows(calibration, CompressionError)


def check_layer_bits(config: MESwitchConfig, quantised: Iterable[str]) -> None:
    """Refuse a ``layer_bits`` pattern that would do nothing.

    Args:
        config: the config.
        quantised: canonical names of the model's linear layers, embeddings and output head.

    Raises:
        CompressionError: a pattern is found in none of the names.

    >>> check_layer_bits(MESwitchConfig(layer_bits={"up_proj$": 3}), ["model.layers.0.mlp.up_proj"])
    """
    names = list(quantised)
    for pattern in config.layer_bits:
        if not any(re.search(pattern, name) for name in names):
            more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            raise CompressionError(
                f"layer_bits: {pattern!r} is found in the name of no linear layer or embedding. They are called "
                f"{', '.join(names[:_NAMES_SHOWN])}{more}."
            )


def _check_writable(output: Path) -> None:
    """Only writing tells: permissions say little on network drives, in containers, and to root."""
    made: list[Path] = []
    try:
        for folder in [*reversed(output.parents), output]:
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise CompressionError(f"output_dir {output} cannot be written to: {error}. Give another.") from error
    finally:
        for folder in reversed(made):
            folder.rmdir()
