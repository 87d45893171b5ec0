"""Bytes on disk of one base with 3 and 16 experts: ours, the ME-Switch paper's accounting, BitDelta's.

    python -m benchmarks.size

No weights are made: models are built on the meta device. Writes ``benchmarks/results/size.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.provenance import provenance, write_result
from benchmarks.size.architectures import ARCHITECTURES, ROUTER, ROUTER_NAME, on_meta
from benchmarks.size.others import bitdelta_delta, dense_bytes, paper_delta
from benchmarks.size.ours import predict
from transformers_meswitch.configuration import MESwitchConfig

EXPERTS = (3, 16)
BITS = (1, 2, 3, 4)
#: What is said of ours, whether embedding and output head changed, and how they are stored.
OURS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("all changed", True, {}),
    ("all changed, embedding and head in 16 bit", True, {"embedding_bits": None}),
    ("embedding and head frozen", False, {}),
)
RESULT = Path(__file__).parents[1] / "results" / "size.json"
ASSUMPTIONS = [
    "A full copy is 2 bytes a parameter. Full copies: experts x full copy; the base itself is needed by none of them.",
    "Stored by every scheme: the base in 16 bit, once, and a delta an expert. Ratio = full copies / stored.",
    "Ours: every byte of adapter_model.safetensors (header and padding included) and adapter_config.json (the base's "
    "fingerprint included); 16 salient channels a layer, a float32 step a row. Tokenizer and card, the same on both "
    "sides, are left out.",
    "Ours, all changed: a full fine-tune changes every row of embedding and head, which are quantised at 3 bits (the "
    "default embedding_bits), with salient channels and steps as in a layer.",
    "Ours, all changed, embedding and head in 16 bit: the same with embedding_bits None, every such row exact.",
    "Ours, embedding and head frozen: only linears, biases and norms differ.",
    "Paper: linears at 2 bits, all else in 16 bit an expert; steps, salient channels and indices count nothing.",
    f"Paper with router: plus one router of the size of {ROUTER_NAME} in 16 bit.",
    "BitDelta: linears at 1 bit, one 16-bit scalar a matrix, all else in 16 bit an expert.",
]


def rows_of(base: str, model: PreTrainedModel, router: int) -> list[dict[str, Any]]:
    """One row a scheme: bytes an expert, bytes in all and ratio for each number of experts."""
    schemes: list[tuple[str, int, int]] = []
    for label, rows, options in OURS:
        for bits in BITS:
            total = predict(model, base, MESwitchConfig(base, bits=bits, **options), rows=rows).total
            schemes.append((f"ours, {bits} bit, {label}", total, 0))
    schemes += [
        ("paper's accounting, 2 bit", paper_delta(model), 0),
        ("paper's accounting, 2 bit, with router", paper_delta(model), router),
        ("BitDelta's accounting, 1 bit", bitdelta_delta(model), 0),
    ]
    full = dense_bytes(model)
    result = []
    for scheme, delta, extra in schemes:
        row: dict[str, Any] = {"model": base, "scheme": scheme, "full_copy_bytes": full, "delta_bytes": delta}
        for experts in EXPERTS:
            stored = full + experts * delta + extra
            row[f"stored_bytes_{experts}"] = stored
            row[f"ratio_{experts}"] = round(experts * full / stored, 4)
        result.append(row)
    return result


def render(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    head = ["model", "scheme", "delta, bytes", *(f"{n} experts, bytes | ratio" for n in EXPERTS)]
    align = ["---", "---", "---:", *("---: | ---:" for _ in EXPERTS)]
    lines = [" | ".join(head), " | ".join(align)]
    for row in rows:
        cells = [row["model"], row["scheme"], f"{row['delta_bytes']:,}"]
        cells += [f"{row[f'stored_bytes_{n}']:,} | {row[f'ratio_{n}']:.2f}" for n in EXPERTS]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    args = parser.parse_args()
    router = dense_bytes(on_meta(ROUTER))
    rows: list[dict[str, Any]] = []
    for base, config in tqdm(ARCHITECTURES.items(), desc="Counting", unit="model", disable=None):
        rows += rows_of(base, on_meta(config), router)
    result = {
        **provenance("benchmarks.size", "meta"),
        "assumptions": ASSUMPTIONS,
        "router_bytes": router,
        "rows": rows,
    }
    write_result(args.output, result)
    print(render(rows))


if __name__ == "__main__":
    main()
