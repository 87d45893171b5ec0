"""What the run found, as a table, as JSON and as a Markdown transcript."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accuracy import confidence_interval
from safetensors import safe_open

import transformers_meswitch


def environment(device: torch.device) -> dict[str, str]:
    """Device and versions that the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "transformers_meswitch": getattr(transformers_meswitch, "__version__", "source tree"),
    }


def folder_bytes(folder: Path) -> dict[str, int]:
    """File name to size in bytes, and their sum as ``"total"``."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return {**sizes, "total": sum(sizes.values())}


def delta_tensor_bytes(delta: Path) -> dict[str, int]:
    """Bytes of a delta's tensors by leaf: ``codes``, ``step``, ``salient``, ``rows``, ``values.weight``, ..."""
    sizes: Counter[str] = Counter()
    for weights in sorted(delta.glob("adapter_model*.safetensors")):
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                tensor = file.get_tensor(key)
                sizes[key.partition("meswitch_delta.")[2]] += tensor.numel() * tensor.element_size()
    return dict(sorted(sizes.items()))


def accuracy_row(model: str, task: str, right: list[bool], seconds: float) -> dict[str, Any]:
    """One line of the accuracy table."""
    low, high = confidence_interval(sum(right), len(right))
    return {
        "model": model,
        "task": task,
        "right": sum(right),
        "of": len(right),
        "exact_match": round(sum(right) / len(right), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "seconds": round(seconds, 1),
    }


def table(results: dict[str, Any]) -> str:
    """Accuracies and sizes as Markdown tables."""
    lines = ["| model | task | exact match | 95 % interval | right / of |", "| --- | --- | --- | --- | --- |"]
    for row in results["accuracy"]:
        low, high = row["interval_95"]
        lines.append(
            f"| {row['model']} | {row['task']} | {row['exact_match']:.3f} | {low:.3f} to {high:.3f} "
            f"| {row['right']} / {row['of']} |"
        )
    lines += ["", "| on disk | bytes |", "| --- | ---: |"]
    lines += [f"| {name} | {sizes['total']:,} |" for name, sizes in results["bytes"].items()]
    leaves = sorted({leaf for sizes in results["delta_tensor_bytes"].values() for leaf in sizes})
    experts = list(results["delta_tensor_bytes"])
    lines += ["", f"| bytes in the delta of | {' | '.join(experts)} |", f"| --- |{' ---: |' * len(experts)}"]
    for leaf in leaves:
        sizes = [results["delta_tensor_bytes"][name].get(leaf, 0) for name in experts]
        lines.append(f"| `{leaf}` | {' | '.join(f'{size:,}' for size in sizes)} |")
    return "\n".join(lines)


def transcript(results: dict[str, Any]) -> str:
    """The whole report as Markdown: setting, tables, and the mixed batch row by row."""
    setting = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    lines = [
        "# SmolLM2-135M-Instruct: a family of two experts",
        "",
        setting,
        "",
        table(results),
        "",
        "## One mixed batch",
    ]
    for row in results["mixed_batch"]:
        lines += ["", f"### `expert={row['expert']!r}`", "", "Prompt:", "", "```text", row["prompt"], "```"]
        for label in ("answer", "full-precision expert", "base", "reference"):
            if row.get(label) is not None:
                lines += ["", f"{label.capitalize()}:", "", "```text", row[label], "```"]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], output_json: Path | None, markdown: Path | None) -> None:
    """Write the JSON and the transcript where they were asked for."""
    for path, text in ((output_json, json.dumps(results, indent=2) + "\n"), (markdown, transcript(results))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
