"""Checks of untrusted delta repos: the config, what the weight files claim to hold, and the values themselves.

Each check collects everything that is wrong before it raises, so that one error names every offender.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..configuration import MESwitchExpertConfig
from ..errors import DeltaFormatError
from .header import TensorHeader
from .spec import (
    ADAPTER_CONFIG_NAME,
    LEAF_PREFIX,
    PEFT_TYPE,
    AnyRowsRecord,
    LinearRecord,
    ModuleRecord,
    QuantizedRowsRecord,
    ValuesRecord,
    packed_width,
    parse_record,
    tensor_key,
)

__all__ = ["check_config", "check_headers", "check_values", "tensor_headers"]

#: Dtypes that a model's own values may have.
_FLOATS = ("F16", "BF16", "F32", "F64")
_DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_COMPONENT = re.compile(r"[A-Za-z0-9_-]+")
_MOST_NAMED = 20
#: Elements looked at in one go, so that checking an embedding does not take several times its memory.
_CHUNK = 1 << 22
#: Types of the optional config fields; each may be left out or null.
_FIELDS: dict[str, type] = {
    "format_release": str,
    "revision": str,
    "bits": int,
    "salient_channels": int,
    "base_model_type": str,
    "base_fingerprint": dict,
    "vocab_size": int,
    "tie_word_embeddings": bool,
    "eos_token_id": list,
    "pad_token_id": int,
    "expert_model_name_or_path": str,
    "saliency": str,
    "calibration": dict,
    "distilled": dict,
    "imported_from": str,
    "task_type": str,
}
#: Types of the fields of ``distilled``, all of which it has.
_DISTILLED: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "text": (str,),
    "kl_before": (float, int),
    "kl_after": (float, int),
}
#: Types of the fields of ``calibration``; the last is only there of a file.
_CALIBRATION: dict[str, tuple[type, ...]] = {"source": (str,), "samples": (int,), "sha256": (str, type(None))}
_WAY_OUT = "The delta repo is damaged or was edited; download it or compress the expert again."


def _report(what: str, problems: list[str]) -> None:
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:_MOST_NAMED])
        more = len(problems) - _MOST_NAMED
        rest = f"\n  - and {more} more" if more > 0 else ""
        raise DeltaFormatError(f"{what}:{shown}{rest}\n{_WAY_OUT}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _is_module_name(name: Any) -> bool:
    parts = name.split(".") if isinstance(name, str) else []
    return bool(parts) and all(_COMPONENT.fullmatch(part) and part != LEAF_PREFIX for part in parts)


def check_config(config: Mapping[str, Any] | MESwitchExpertConfig) -> dict[str, ModuleRecord]:
    """Check ``adapter_config.json``; fields this version does not know are ignored.

    Args:
        config: the parsed JSON object, or the configuration made from one.

    Returns:
        The parsed modules table.

    Raises:
        FormatVersionError: the format version is later than this release reads (told before anything else).
        DeltaFormatError: another PEFT type, no version, no base, no modules, a module name that is not a dotted path,
            a malformed record or a field of the wrong type.
    """
    fields: Mapping[str, Any] = vars(config) if isinstance(config, MESwitchExpertConfig) else config
    if fields.get("peft_type") != PEFT_TYPE:
        raise DeltaFormatError(
            f"{ADAPTER_CONFIG_NAME}: peft_type is {fields.get('peft_type')!r}, expected {PEFT_TYPE!r}. This is not "
            "a delta repo; load other adapters with PEFT, and full checkpoints with AutoModelForCausalLM."
        )
    version = fields.get("format_version")
    if not _is(version, int):
        raise DeltaFormatError(
            f"{ADAPTER_CONFIG_NAME}: format_version is {version!r}, expected an integer. {_WAY_OUT}"
        )
    release = fields.get("format_release")
    MESwitchExpertConfig(format_version=version, format_release=release)  # type: ignore[arg-type]  # refuses later ones

    problems = []
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        problems.append(f"base_model_name_or_path is {base!r}, expected the id or path of the base")
    for name, kind in _FIELDS.items():
        value = fields.get(name)
        if value is not None and not _is(value, kind):
            problems.append(f"{name} is {value!r}, expected {kind.__name__} or null")
        elif kind is int and value is not None and value < 0:
            problems.append(f"{name} is {value}, expected at least 0")
    eos = fields.get("eos_token_id")
    if isinstance(eos, list) and not all(_is(token, int) and token >= 0 for token in eos):
        problems.append(f"eos_token_id is {eos!r}, expected a list of token ids")
    for field, types in (("distilled", _DISTILLED), ("calibration", _CALIBRATION)):
        entry = fields.get(field)
        if not isinstance(entry, dict):
            continue
        for name, kinds in types.items():
            value = entry.get(name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                problems.append(f"{field}[{name!r}] is {value!r}, expected {kinds[0].__name__}")
    modules = fields.get("modules")
    if not isinstance(modules, Mapping) or not modules:
        problems.append(f"modules is {modules!r}, expected an object with at least one module")
        modules = {}
    records = {}
    for name, entry in modules.items():
        if not _is_module_name(name):
            problems.append(
                f"modules names {name!r}, expected a dotted module path such as 'model.layers.0.mlp.up_proj'"
            )
            continue
        record = parse_record(name, entry)
        if isinstance(record, ValuesRecord) and not all(map(_COMPONENT.fullmatch, record.shapes)):
            problems.append(f"modules[{name!r}] names the parameters {sorted(record.shapes)}, expected plain names")
        elif isinstance(record, QuantizedRowsRecord) and version == 1:
            problems.append(f"modules[{name!r}] is of kind 'quantized_rows', which format version 1 does not have")
        elif not record.leaves():
            problems.append(f"modules[{name!r}] announces no tensors")
        records[name] = record
    _report(f"{ADAPTER_CONFIG_NAME} is not valid", problems)
    return records


def tensor_headers(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (safetensors name) and shape of tensors in memory, as :func:`check_headers` takes them.

    >>> tensor_headers({"step": torch.zeros(3)})
    {'step': ('F32', (3,))}
    """
    return {key: (_DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in tensors.items()}


def check_headers(
    records: Mapping[str, ModuleRecord], headers: Mapping[str, tuple[str, tuple[int, ...]] | TensorHeader]
) -> None:
    """Check that exactly the announced tensors are there, each of its dtype and shape. Reads no data.

    Args:
        records: the modules table.
        headers: tensor name on disk to (safetensors dtype, shape).

    Raises:
        DeltaFormatError: naming every tensor that is missing, unexpected, or of another dtype or shape.
    """
    problems = []
    announced = set()
    for module, record in records.items():
        for leaf, (dtype, shape) in record.leaves().items():
            key = tensor_key(module, leaf)
            announced.add(key)
            if key not in headers:
                problems.append(f"{key} is missing, expected {dtype or 'a floating dtype'} {list(shape)}")
                continue
            header = headers[key]
            found_dtype, found_shape = (
                (header.dtype, header.shape) if isinstance(header, TensorHeader) else (header[0], tuple(header[1]))
            )
            if found_dtype not in ((dtype,) if dtype else _FLOATS):
                problems.append(f"{key} has dtype {found_dtype}, expected {dtype or ' or '.join(_FLOATS)}")
            if found_shape != shape:
                problems.append(f"{key} has shape {list(found_shape)}, expected {list(shape)}")
    problems += [f"{key} is not announced by the modules table" for key in sorted(set(headers) - announced)]
    _report("The delta's tensors do not fit its modules table", problems)


def _not_finite(key: str, tensor: torch.Tensor) -> Iterator[str]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        finite = torch.isfinite(flat[start : start + _CHUNK])
        if not finite.all():
            place = start + int((~finite).to(torch.uint8).argmax())
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape)]
            yield f"{key} is {float(flat[place])} at {index}, expected finite values"
            return


def _bad_index(key: str, index: torch.Tensor, limit: int) -> Iterator[str]:
    if not index.numel():
        return
    if (index[1:] <= index[:-1]).any():
        place = int((index[1:] <= index[:-1]).to(torch.uint8).argmax())
        yield f"{key} goes from {int(index[place])} to {int(index[place + 1])} at {place}, expected strictly ascending"
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= limit:
        yield f"{key} holds {low if low < 0 else high}, expected indices from 0 to {limit - 1}"


def _bad_overlap(module: str, coded: torch.Tensor, exact: torch.Tensor) -> Iterator[str]:
    both = coded[torch.isin(coded, exact)]
    if both.numel():
        yield (
            f"{tensor_key(module, 'row_index')} and {tensor_key(module, 'exact_index')} both hold {int(both[0])}, "
            "expected a row to be coded or exact"
        )


def _bad_padding(key: str, codes: torch.Tensor, record: LinearRecord | QuantizedRowsRecord) -> Iterator[str]:
    used = record.coded_channels * record.bits
    pad = packed_width(record.coded_channels, record.bits) * 8 - used
    if pad and codes.numel():
        rest = codes[:, -1] >> (8 - pad)
        if rest.any():
            row = int(rest.bool().to(torch.uint8).argmax())
            yield f"{key} has bits set past bit {used} of row {row}, expected zeros"


def _bad_values(module: str, record: ModuleRecord, get: Callable[[str], torch.Tensor]) -> Iterator[str]:
    for leaf in record.leaves():
        key = tensor_key(module, leaf)
        tensor = get(key)
        if leaf == "codes" and isinstance(record, LinearRecord | QuantizedRowsRecord):
            yield from _bad_padding(key, tensor, record)
        elif leaf == "salient_index" and isinstance(record, LinearRecord | QuantizedRowsRecord):
            yield from _bad_index(key, tensor, record.coded_channels + record.salient_channels)
        elif leaf in ("row_index", "exact_index") and isinstance(record, AnyRowsRecord):
            yield from _bad_index(key, tensor, record.num_rows)
        else:
            yield from _not_finite(key, tensor)
        if leaf == "step" and tensor.numel() and float(tensor.min()) < 0:
            row = int(tensor.argmin())
            yield f"{key} is {float(tensor[row])} at [{row}], expected step sizes of at least 0"
    if isinstance(record, QuantizedRowsRecord) and record.has_row_index and record.exact_rows:
        yield from _bad_overlap(module, *(get(tensor_key(module, leaf)) for leaf in ("row_index", "exact_index")))


def check_values(records: Mapping[str, ModuleRecord], get: Callable[[str], torch.Tensor]) -> None:
    """Check the data of tensors that passed :func:`check_headers`.

    Step sizes are finite and not negative; step sizes per column, salient columns and the expert's own values are
    finite; indices ascend strictly within range; no row is both coded and exact; the bits that fill up a row of codes
    are zero.

    Args:
        records: the modules table.
        get: tensor name on disk to tensor, asked for one at a time.

    Raises:
        DeltaFormatError: naming every offending tensor, the first offending place, what is there and what is expected.
    """
    problems = [p for module, record in records.items() for p in _bad_values(module, record, get)]
    _report("The delta holds values out of range", problems)
