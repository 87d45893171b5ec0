"""One embedding or output head: the rows that a fine-tune changed, quantised against the base's if that is smaller."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..delta_format.spec import AnyRowsRecord, QuantizedRowsRecord, RowsRecord, record_bytes
from .differences import Difference, bit_patterns, differs
from .linear import compress_linear

__all__ = ["coded_index", "compress_rows", "rows_record"]


def rows_record(
    num_rows: int,
    width: int,
    changed: int,
    added: int,
    *,
    bits: int | None,
    salient_channels: int,
    own_bytes: int,
    bias: bool = False,
) -> AnyRowsRecord:
    """How to store an embedding or output head: whichever of the two kinds takes fewer bytes.

    Args:
        num_rows: rows of the expert's matrix.
        width: columns of it.
        changed: rows that differ from the base's.
        added: rows that the base does not have.
        bits: bits of one code; `None` keeps every row exact.
        salient_channels: columns to keep in bfloat16, at most ``width`` of which exist.
        own_bytes: bytes of an element of the expert's dtype.
        bias: whether the expert's bias is stored.

    >>> rows_record(100, 64, changed=100, added=0, bits=3, salient_channels=4, own_bytes=2).kind
    'quantized_rows'
    >>> rows_record(100, 2, changed=100, added=0, bits=3, salient_channels=2, own_bytes=2).kind
    'rows'
    """
    exact = RowsRecord(num_rows, width, changed + added, bias)
    if bits is None or not changed:
        return exact
    salient = min(salient_channels, width)
    quantized = QuantizedRowsRecord(num_rows, width, bits, changed, added, salient, bias)
    return quantized if record_bytes(quantized, own_bytes) < record_bytes(exact, own_bytes) else exact


def compress_rows(
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    *,
    bits: int | None,
    salient_channels: int,
    second_moment: Tensor | None = None,
) -> tuple[AnyRowsRecord, dict[str, Tensor]] | None:
    """The rows of an embedding or output head that differ from the base's, bit for bit, or that the base lacks.

    Args:
        base: ``weight`` ``[base rows, width]`` and maybe ``bias`` ``[base rows]``, floating.
        expert: ``weight`` ``[num_rows, width]`` and maybe ``bias`` ``[num_rows]``; float32, bfloat16 or float16.
        bits: bits of one code for rows that changed; `None` keeps them exact. Added rows always are.
        salient_channels: columns of the changed rows to keep in bfloat16.
        second_moment: of the output head's inputs, as :func:`~.linear.compress_linear` takes it for ``in = width``.

    Returns:
        The record and its leaves by name, or `None` where base and expert are equal.

    Raises:
        CompressionError: as :func:`~.linear.compress_linear`.

    >>> one, two = {"weight": torch.zeros(4, 64)}, {"weight": torch.zeros(4, 64)}
    >>> two["weight"][2] = 0.5
    >>> record, leaves = compress_rows(one, two, bits=1, salient_channels=0)
    >>> record.coded_rows, leaves["row_index"].tolist(), leaves["step"].tolist()
    (1, [2], [1.0])
    """
    weight, of_base = expert["weight"], base["weight"].to(expert["weight"].device)
    num_rows, width = weight.shape
    shared = min(num_rows, len(of_base))
    differing = bit_patterns(of_base[:shared].to(weight.dtype)) != bit_patterns(weight[:shared])
    changed = differing.any(dim=1).nonzero().squeeze(1)
    added = torch.arange(shared, num_rows, device=weight.device)
    own_bias = "bias" in expert and differs(base["bias"], expert["bias"])
    if not (len(changed) or own_bias or num_rows != len(of_base)):
        return None
    record = rows_record(
        num_rows,
        width,
        len(changed),
        len(added),
        bits=bits,
        salient_channels=salient_channels,
        own_bytes=weight.itemsize,
        bias=own_bias,
    )
    if isinstance(record, RowsRecord):
        index = torch.cat([changed, added])
        tensors = {"row_index": index.to(torch.int32), "rows": weight[index]}
    else:
        whole = len(changed) == shared
        ours, theirs = (part[:shared] if whole else part[changed] for part in (weight, of_base))
        delta = Difference(theirs, ours)
        quantized = compress_linear(delta, record.bits, record.salient_channels, second_moment)
        tensors = dict(quantized.tensors)
        if record.has_row_index:
            tensors["row_index"] = changed.to(torch.int32)
        if record.exact_rows:
            tensors["exact_index"] = added.to(torch.int32)
            tensors["rows"] = weight[added]
    if own_bias:
        tensors["bias"] = expert["bias"].contiguous()
    return record, tensors


def coded_index(record: QuantizedRowsRecord, leaves: Mapping[str, Tensor]) -> Tensor:
    """Which rows of the matrix are coded: those listed, else all that are not exact.

    Args:
        record: the module's record.
        leaves: its tensors by leaf, on one device.

    Returns:
        int64 ``[coded_rows]``, ascending, on that device.

    >>> record = QuantizedRowsRecord(num_rows=5, width=2, bits=1, coded_rows=3, exact_rows=2)
    >>> coded_index(record, {"codes": torch.zeros(3, 1), "exact_index": torch.tensor([1, 4])}).tolist()
    [0, 2, 3]
    """
    if record.has_row_index:
        return leaves["row_index"].long()
    place = torch.arange(record.coded_rows, device=leaves["codes"].device)
    if not record.exact_rows:
        return place
    # As many coded rows come before the j-th exact row as its index is greater than j.
    before = leaves["exact_index"].long() - torch.arange(record.exact_rows, device=place.device)
    return place + torch.searchsorted(before, place, right=True)
