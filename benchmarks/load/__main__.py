"""Time and memory of loading a base, of each further expert, and of switching between resident experts.

    python -m benchmarks.load --shape deep --device cpu
    python -m benchmarks.load --shape mistral-7b --device cuda --experts 3

Random weights (speed and memory only). Peers in the same run: one more full copy, which an expert replaces,
transformers' own ``set_adapter``, which visits every layer, and the plain base's ``generate``. The result goes to
``benchmarks/results``; a row that cannot be measured says why. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.integrations import PeftAdapterMixin

from benchmarks.load.random_family import SHAPES, write_base, write_delta_repo
from benchmarks.provenance import device_name, provenance, write_result
from benchmarks.timing import attempt, timed
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM

RESULTS = Path(__file__).parents[1] / "results"
BASE_LOAD = "from_pretrained(base), which a full copy costs again"
STOCK = "transformers' set_adapter"
PLAIN = "generate, 1 token, the plain base"
_NEW_TOKENS = 1


def memory(device: str) -> int:
    """Bytes held now: by torch on a GPU, resident on a CPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def reset_peak(device: str) -> bool:
    """Forget what was held before; whether that is possible."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        # proc(5): 5 resets the peak resident set size to the current one.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak(device: str) -> int:
    """Largest number of bytes held since :func:`reset_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def median_us(action: Callable[[int], Any], repeats: int, device: str) -> float:
    """Median microseconds of ``action(i)``."""
    times = []
    for i in range(repeats + 10):
        _, seconds = timed(lambda i=i: action(i), device)
        times.append(seconds * 1e6)
    return statistics.median(times[10:])


def allocated_by(action: Callable[[int], Any], device: str) -> dict[str, int]:
    """Bytes that a hundred calls leave behind and at most hold, on the GPU and in Python."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory("cuda") if device == "cuda" else 0
    tracemalloc.start()
    for i in range(100):
        action(i)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = {"python_kept": kept, "python_peak": most}
    if device == "cuda":
        found |= {"gpu_kept": memory("cuda") - before, "gpu_peak": torch.cuda.max_memory_allocated() - before}
    return found


def measure(folder: Path, shape: str, device: str, experts: int, bits: int) -> list[dict[str, Any]]:
    """One row a measurement."""
    config = SHAPES[shape]
    base = folder / "base"
    write_base(base, config, device)
    request = MESwitchConfig(str(base), bits=bits)
    names = [f"expert-{i}" for i in range(experts)]
    for i, name in enumerate(names):
        write_delta_repo(folder / name, base, config, request, seed=i)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    options = {"dtype": torch.bfloat16, "device_map": device, "local_files_only": True}
    model, row = load(BASE_LOAD, base, lambda: MESwitchModelForCausalLM.from_pretrained(base, **options), device)
    rows = [row]
    for name in names:
        _, row = load(
            f"load_adapter({name})",
            folder / name,
            lambda name=name: model.load_adapter(folder / name, adapter_name=name),
            device,
        )
        rows.append(row)
    ids = torch.randint(3, config.vocab_size, (1, 8), device=device)
    greedy = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def sticky(i: int) -> None:
        model.set_expert(names[i % experts])

    def stock(i: int) -> None:
        PeftAdapterMixin.set_adapter(model, names[i % experts])

    def per_call(i: int) -> None:
        model.generate(ids, expert=names[i % experts], **greedy)

    # With transformers' generate taken out, what is left is what choosing the expert costs.
    nothing = mock.patch.object(GenerationMixin, "generate", lambda self, inputs, *args, **kwargs: inputs)
    for label, action, context in (
        ("set_expert", sticky, nullcontext()),
        ("generate(expert=), without transformers' own generate", per_call, nothing),
        # transformers 5.24 for one refuses its own set_adapter under every PEFT that is released.
        (STOCK, stock, nullcontext()),
    ):
        with context:
            rows.append(
                attempt(
                    {"what": label},
                    lambda action=action: {
                        "median_us": median_us(action, 500, device),
                        **allocated_by(action, device),
                    },
                )
            )
    plain = AutoModelForCausalLM.from_pretrained(base, **options)
    for label, action in (
        (PLAIN, lambda i: plain.generate(ids, **greedy)),
        ("generate, 1 token, the same expert each call", lambda i: model.generate(ids, expert=names[0], **greedy)),
        ("generate, 1 token, another expert each call", per_call),
    ):
        rows.append(attempt({"what": label}, lambda action=action: {"median_us": median_us(action, 20, device)}))
    return rows


def plain_read_seconds(folder: Path) -> float:
    """Seconds to read the weight files into memory and do nothing with them: what any load takes at least."""
    buffer = bytearray(1 << 24)
    start = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def load(what: str, folder: Path, action: Callable[[], Any], device: str) -> tuple[Any, dict[str, Any]]:
    """Load something from a folder; what was loaded, and its row."""
    known, before = reset_peak(device), memory(device)
    result, seconds = timed(action, device)
    row = {
        "what": what,
        "bytes_on_disk": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "seconds": seconds,
        "held_bytes": memory(device) - before,
        "peak_bytes": peak(device) if known else None,
    }
    row["plain_read_seconds"] = plain_read_seconds(folder)
    row["share_of_plain_read"] = round(row["plain_read_seconds"] / seconds, 3)
    return result, row


def _ratio(row: dict[str, Any], times: dict[str, float]) -> str:
    """A load to the base's, a switch to transformers' own, a ``generate`` to the plain base's."""
    own, reference = times.get(row["what"]), PLAIN
    if "seconds" in row:
        reference = BASE_LOAD
    elif "python_kept" in row:
        reference = STOCK
    return f"{own / times[reference]:.4g}" if own is not None and reference in times else ""


def render(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; see :func:`_ratio` for what the ratios are to."""
    times = {row["what"]: row.get("seconds", row.get("median_us")) for row in rows if "unavailable" not in row}
    lines = [
        "| what | time | ratio | share of a plain read | on disk, MB | held, MB | peak, MB | left allocated, bytes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "unavailable" in row:
            lines.append(f"| {row['what']} | unavailable: {row['unavailable']} | | | | | | |")
            continue
        took = f"{row['seconds']:.2f} s" if "seconds" in row else f"{row['median_us']:,.1f} µs"
        share = f"{row['share_of_plain_read']:.2f}" if "seconds" in row else ""
        counts = (row.get(key) for key in ("bytes_on_disk", "held_bytes", "peak_bytes"))
        sizes = ["" if count is None else f"{count / 1e6:,.1f}" for count in counts]
        left = row.get("gpu_kept", row.get("python_kept", ""))
        lines.append(f"| {row['what']} | {took} | {_ratio(row, times)} | {share} | {' | '.join(sizes)} | {left} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="deep")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/load_<shape>_<device>.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.shape, args.device, args.experts, args.bits)
    result = {
        **provenance("benchmarks.load", device_name(args.device)),
        "weights": "random: for time and memory only",
        "rows": rows,
    }
    output = args.output or RESULTS / f"load_{args.shape}_{args.device}.json"
    write_result(output, result)
    print(render(rows))


if __name__ == "__main__":
    main()
