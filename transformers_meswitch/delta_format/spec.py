"""The constants and records of the delta format, version 2. The prose is in ``docs/delta_format.md``.

A delta repo is a PEFT adapter repo. ``adapter_config.json`` holds a ``modules`` table: canonical module name of the
causal LM (``model.layers.0.mlp.up_proj``) to one of the four records below; ``adapter_model.safetensors`` holds, for
each module, the leaves that its record announces, under ``base_model.model.<module>.meswitch_delta.<leaf>``.

==============  ===============================================================================================
kind            what is stored
==============  ===============================================================================================
linear          the weight's delta, quantised: ``codes``, ``step``, optional ``column_step``, ``salient_index`` and
                ``salient``; ``bias`` is the expert's own bias where it differs from the base's
rows            the expert's own rows of an embedding or output head that differ from the base's or are new:
                ``row_index`` and ``rows``; ``bias`` as above
quantized_rows  changed rows of an embedding or output head as quantised deltas against the base's rows: ``codes``,
                ``step``, optional ``row_index``, ``salient_index`` and ``salient``; other rows, added ones among
                them, as the expert's own: ``exact_index`` and ``rows``; ``bias`` as above. Since version 2
values          the expert's own parameters of a small module (a norm): ``values.<parameter>``
==============  ===============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import DeltaFormatError

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "ADAPTER_WEIGHTS_NAME",
    "EVIDENCE_NAME",
    "FORMAT_RELEASES",
    "FORMAT_VERSION",
    "KEY_PREFIX",
    "LEAF_PREFIX",
    "PEFT_TYPE",
    "SUPPORTED_BITS",
    "AnyRowsRecord",
    "LinearRecord",
    "ModuleRecord",
    "QuantizedRowsRecord",
    "RowsRecord",
    "ValuesRecord",
    "bits_per_weight",
    "packed_width",
    "parse_record",
    "record_bytes",
    "tensor_key",
]

FORMAT_VERSION = 2
#: Format version to the release of this package that first reads it. Written into deltas, so that a release that is
#: too old can name the one that is needed.
FORMAT_RELEASES = {1: "0.1.0", 2: "0.2.0"}
PEFT_TYPE = "MESWITCH"
SUPPORTED_BITS = (1, 2, 3, 4)
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
#: What ``meswitch verify`` measured of the very tensors beside it; not part of the delta, and never needed to load it.
EVIDENCE_NAME = "meswitch_evidence.json"
#: PEFT prepends this to every module name on disk.
KEY_PREFIX = "base_model.model."
#: Attribute of a wrapped layer that holds its deltas; also the PEFT prefix of the method.
LEAF_PREFIX = "meswitch_delta"

#: Leaf name to (safetensors dtype, shape); ``None`` as dtype means "the expert's own floating dtype".
LeafTable = dict[str, tuple[str | None, tuple[int, ...]]]


def packed_width(channels: int, bits: int) -> int:
    """Bytes of one packed row of ``channels`` codes of ``bits`` bits: ``ceil(channels * bits / 8)``.

    >>> packed_width(7, 3)
    3
    """
    return (channels * bits + 7) // 8


@dataclass(frozen=True)
class LinearRecord:
    """A linear layer whose weight delta is quantised.

    Attributes:
        out_features: rows of the weight, seen as a linear's ``[out, in]`` (a GPT-2 ``Conv1D`` is stored transposed).
        in_features: columns of the weight.
        bits: bits of one code, 1 to 4.
        salient_channels: how many input channels are kept in bfloat16 instead of in the codes.
        column_step: whether a step per (non-salient) input channel multiplies the step per row.
        bias: whether the expert's own bias is stored.
    """

    out_features: int
    in_features: int
    bits: int
    salient_channels: int = 0
    column_step: bool = False
    bias: bool = False
    kind: str = "linear"

    @property
    def coded_channels(self) -> int:
        """Input channels held in the codes: all but the salient ones."""
        return self.in_features - self.salient_channels

    def leaves(self) -> LeafTable:
        """The tensors this record announces."""
        out, coded, salient = self.out_features, self.coded_channels, self.salient_channels
        table: LeafTable = {"codes": ("U8", (out, packed_width(coded, self.bits))), "step": ("F32", (out,))}
        if self.column_step:
            table["column_step"] = ("F32", (coded,))
        if salient:
            table["salient_index"] = ("I32", (salient,))
            table["salient"] = ("BF16", (out, salient))
        if self.bias:
            table["bias"] = (None, (out,))
        return table


@dataclass(frozen=True)
class RowsRecord:
    """An embedding or output head of which only changed and added rows are stored.

    Attributes:
        num_rows: rows of the expert's matrix (its vocabulary size).
        width: columns of the matrix.
        rows: how many rows are stored; rows at or past the base's number of rows are always among them.
        bias: whether the expert's own bias (``[num_rows]``) is stored.
    """

    num_rows: int
    width: int
    rows: int
    bias: bool = False
    kind: str = "rows"

    def leaves(self) -> LeafTable:
        """The tensors this record announces."""
        table: LeafTable = {"row_index": ("I32", (self.rows,)), "rows": (None, (self.rows, self.width))}
        if self.bias:
            table["bias"] = (None, (self.num_rows,))
        return table


@dataclass(frozen=True)
class QuantizedRowsRecord:
    """An embedding or output head whose changed rows are stored as quantised deltas against the base's rows.

    Attributes:
        num_rows: rows of the expert's matrix (its vocabulary size).
        width: columns of the matrix.
        bits: bits of one code, 1 to 4.
        coded_rows: how many rows are the base's plus a quantised delta.
        exact_rows: how many are stored as they are; rows at or past the base's number of rows are always among them.
        salient_channels: how many columns of the coded rows are kept in bfloat16 instead of in the codes.
        bias: whether the expert's own bias (``[num_rows]``) is stored.
    """

    num_rows: int
    width: int
    bits: int
    coded_rows: int
    exact_rows: int = 0
    salient_channels: int = 0
    bias: bool = False
    kind: str = "quantized_rows"

    @property
    def coded_channels(self) -> int:
        """Columns held in the codes: all but the salient ones."""
        return self.width - self.salient_channels

    @property
    def has_row_index(self) -> bool:
        """Whether coded rows are listed; where all rows are coded or exact, they are those that are not exact."""
        return self.coded_rows + self.exact_rows < self.num_rows

    def as_linear(self, rows: int) -> LinearRecord:
        """The record of a linear whose weight delta is that of ``rows`` coded rows."""
        return LinearRecord(rows, self.width, self.bits, self.salient_channels)

    def leaves(self) -> LeafTable:
        """The tensors this record announces."""
        coded, exact = self.coded_rows, self.exact_rows
        table: LeafTable = {"row_index": ("I32", (coded,))} if self.has_row_index else {}
        table |= self.as_linear(coded).leaves()
        if exact:
            table["exact_index"] = ("I32", (exact,))
            table["rows"] = (None, (exact, self.width))
        if self.bias:
            table["bias"] = (None, (self.num_rows,))
        return table


@dataclass(frozen=True)
class ValuesRecord:
    """A small module (a norm) of which the expert's own parameters are stored.

    Attributes:
        shapes: parameter name (``weight``, ``bias``) to shape.
    """

    shapes: dict[str, tuple[int, ...]]
    kind: str = "values"

    def leaves(self) -> LeafTable:
        """The tensors this record announces."""
        return {f"values.{name}": (None, tuple(shape)) for name, shape in self.shapes.items()}


#: Records of an embedding or output head.
AnyRowsRecord = RowsRecord | QuantizedRowsRecord
ModuleRecord = LinearRecord | AnyRowsRecord | ValuesRecord

_FIXED_BYTES = {"U8": 1, "I32": 4, "F32": 4, "BF16": 2}


def record_bytes(record: ModuleRecord, own_bytes: int) -> int:
    """Bytes of a module's tensors on disk, headers excluded.

    Args:
        record: the module's record.
        own_bytes: bytes of an element of the expert's own dtype, 2 for bfloat16.

    >>> record_bytes(RowsRecord(num_rows=8, width=4, rows=2), own_bytes=2)
    24
    """
    return sum(
        (own_bytes if dtype is None else _FIXED_BYTES[dtype]) * math.prod(shape)
        for dtype, shape in record.leaves().values()
    )


def bits_per_weight(records: Iterable[ModuleRecord]) -> float | None:
    """Bits that a weight of the linear layers takes on average: codes, steps, salient channels and their indices.

    Args:
        records: of all modules; those that are no linears play no part, nor do biases and headers.

    Returns:
        `None` where there is no linear.

    >>> bits_per_weight([LinearRecord(out_features=8, in_features=64, bits=1)])
    1.5
    """
    linears = [record for record in records if isinstance(record, LinearRecord)]
    weights = sum(record.out_features * record.in_features for record in linears)
    # Leaves in the expert's own dtype are biases.
    return 8 * sum(record_bytes(record, own_bytes=0) for record in linears) / weights if weights else None


def _require(entry: dict[str, Any], module: str, field: str, kind: type, default: Any = None) -> Any:
    value = entry.get(field, default)
    if (kind is int and isinstance(value, bool)) or not isinstance(value, kind):
        raise DeltaFormatError(
            f"adapter_config.json: modules[{module!r}][{field!r}] is {value!r}, expected {kind.__name__}. "
            "The delta repo is damaged; download or compress it again."
        )
    if isinstance(value, int) and value < 0:
        raise DeltaFormatError(f"adapter_config.json: modules[{module!r}][{field!r}] is {value}, expected at least 0.")
    return value


def parse_record(module: str, entry: Any) -> ModuleRecord:
    """Read one entry of the ``modules`` table.

    Args:
        module: canonical module name, for the message.
        entry: the JSON object.

    Raises:
        DeltaFormatError: an unknown kind, a missing or ill-typed field, unsupported bits, impossible sizes.

    >>> parse_record("lm_head", {"kind": "rows", "num_rows": 8, "width": 4, "rows": 2})
    RowsRecord(num_rows=8, width=4, rows=2, bias=False, kind='rows')
    """
    if not isinstance(entry, dict):
        raise DeltaFormatError(f"adapter_config.json: modules[{module!r}] is {entry!r}, expected an object.")
    kind = entry.get("kind")
    if kind == "linear":
        record = LinearRecord(
            out_features=_require(entry, module, "out_features", int),
            in_features=_require(entry, module, "in_features", int),
            bits=_require(entry, module, "bits", int),
            salient_channels=_require(entry, module, "salient_channels", int, 0),
            column_step=_require(entry, module, "column_step", bool, False),
            bias=_require(entry, module, "bias", bool, False),
        )
        _check_codes(module, record)
        return record
    if kind == "rows":
        rows = RowsRecord(
            num_rows=_require(entry, module, "num_rows", int),
            width=_require(entry, module, "width", int),
            rows=_require(entry, module, "rows", int),
            bias=_require(entry, module, "bias", bool, False),
        )
        if rows.rows > rows.num_rows:
            raise DeltaFormatError(
                f"adapter_config.json: modules[{module!r}] stores {rows.rows} rows of a matrix of {rows.num_rows}."
            )
        return rows
    if kind == "quantized_rows":
        quantized = QuantizedRowsRecord(
            num_rows=_require(entry, module, "num_rows", int),
            width=_require(entry, module, "width", int),
            bits=_require(entry, module, "bits", int),
            coded_rows=_require(entry, module, "coded_rows", int),
            exact_rows=_require(entry, module, "exact_rows", int, 0),
            salient_channels=_require(entry, module, "salient_channels", int, 0),
            bias=_require(entry, module, "bias", bool, False),
        )
        _check_codes(module, quantized.as_linear(quantized.coded_rows))
        if quantized.coded_rows + quantized.exact_rows > quantized.num_rows:
            raise DeltaFormatError(
                f"adapter_config.json: modules[{module!r}] stores {quantized.coded_rows} coded and "
                f"{quantized.exact_rows} exact rows of a matrix of {quantized.num_rows}."
            )
        return quantized
    if kind == "values":
        shapes = _require(entry, module, "shapes", dict)
        for name, shape in shapes.items():
            if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
                raise DeltaFormatError(
                    f"adapter_config.json: modules[{module!r}] gives {name!r} the shape {shape!r}, "
                    "expected a list of sizes."
                )
        return ValuesRecord(shapes={name: tuple(shape) for name, shape in shapes.items()})
    raise DeltaFormatError(
        f"adapter_config.json: modules[{module!r}] is of kind {kind!r}; this release knows 'linear', 'rows', "
        "'quantized_rows' and 'values'."
    )


def _check_codes(module: str, record: LinearRecord) -> None:
    if record.bits not in SUPPORTED_BITS:
        raise DeltaFormatError(
            f"adapter_config.json: modules[{module!r}] has bits={record.bits}; supported are {SUPPORTED_BITS}."
        )
    if record.salient_channels > record.in_features:
        raise DeltaFormatError(
            f"adapter_config.json: modules[{module!r}] has {record.salient_channels} salient channels "
            f"but only {record.in_features} input channels."
        )


def tensor_key(module: str, leaf: str) -> str:
    """Name of a leaf in ``adapter_model.safetensors``.

    >>> tensor_key("lm_head", "rows")
    'base_model.model.lm_head.meswitch_delta.rows'
    """
    return f"{KEY_PREFIX}{module}.{LEAF_PREFIX}.{leaf}"
