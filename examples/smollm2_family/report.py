"""What the run found, as a table, as JSON and as a Markdown transcript."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accuracy import confidence_interval, paired_difference
from safetensors import safe_open

import transformers_meswitch

#: Options whose values are places on the machine of the run, and say nothing about the numbers.
_PATHS = ("--work-dir", "--gguf", "--data", "--output-json", "--transcript")


def provenance(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """The command (its paths replaced by what they are), the date, and the device and versions of a run."""
    shown = [
        arguments[i - 1].removeprefix("--").upper() if i and arguments[i - 1] in _PATHS else argument
        for i, argument in enumerate(arguments)
    ]
    return {
        "command": " ".join(["python", "examples/smollm2_family/run.py", *shown]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "environment": environment(device),
    }


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


def paired_row(task: str, before: str, after: str, right: dict[str, list[bool]]) -> dict[str, Any]:
    """One line of the paired table: what ``after`` loses and wins of a task against ``before``, item by item."""
    lost, won, difference, half = paired_difference(right[before], right[after])
    return {
        "task": task,
        "from": before,
        "to": after,
        "lost": lost,
        "won": won,
        "of": len(right[before]),
        "difference": round(difference, 4),
        "half_interval_95": round(half, 4),
    }


def identity_row(task: str, alone: Sequence[str], mixed: Sequence[str]) -> dict[str, Any]:
    """How many answers of a task are the same text in mixed batches as in batches of their own."""
    return {"task": task, "identical": sum(a == m for a, m in zip(alone, mixed, strict=True)), "of": len(alone)}


def shown_items(right: Sequence[bool]) -> list[int]:
    """Which items the transcript shows: the first, and if that is not solved, also the first that is."""
    return [0] if right[0] or not any(right) else [0, list(right).index(True)]


def setting_table(results: dict[str, Any]) -> str:
    """What was run, where and when."""
    training = next(iter(results["training"].values()))
    versions = ", ".join(f"{name} {version}" for name, version in results["environment"].items() if name != "device")
    rows = {
        "base": results["base"],
        "fine-tuning": f"{training['steps']} steps of {training['batch_size']} sequences, all weights, peak learning "
        f"rate {training['learning_rate']:g}, seed {training['seed']}",
        "compression": f"{results['bits']} bits, {results['salient_channels']} salient channels, calibrated on "
        f"{results['calibration_texts']} training texts of the same task",
        "evaluation": f"{results['accuracy'][0]['of']} held-out items a task, greedy, bfloat16",
        "device": results["environment"]["device"],
        "versions": versions,
        "command": f"`{results['command']}`",
        "date": results["date"],
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def accuracy_table(results: dict[str, Any]) -> str:
    """Exact match of every model on every task."""
    lines = ["| model | task | exact match | 95 % interval | right / of |", "| --- | --- | --- | --- | --- |"]
    for row in results["accuracy"]:
        low, high = row["interval_95"]
        lines.append(
            f"| {row['model']} | {row['task']} | {row['exact_match']:.3f} | {low:.3f} to {high:.3f} "
            f"| {row['right']} / {row['of']} |"
        )
    return "\n".join(lines)


def paired_table(results: dict[str, Any]) -> str:
    """What compression changes, item by item."""
    lines = [
        "| task | from | to | lost | won | of | difference, points | 95 % interval |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['task']} | {row['from']} | {row['to']} | {row['lost']} | {row['won']} | {row['of']} "
        f"| {100 * row['difference']:+.1f} | ± {100 * row['half_interval_95']:.1f} |"
        for row in results["paired"]
    ]
    return "\n".join(lines)


def identity_table(results: dict[str, Any]) -> str:
    """Whether a batch's other rows change an answer's text."""
    lines = ["| task | same text in mixed batches as alone | of |", "| --- | ---: | ---: |"]
    lines += [f"| {row['task']} | {row['identical']} | {row['of']} |" for row in results["identical_texts"]]
    return "\n".join(lines)


def size_table(results: dict[str, Any]) -> str:
    """Bytes on disk, and inside the deltas."""
    lines = ["| on disk | bytes |", "| --- | ---: |"]
    lines += [f"| {name} | {sizes['total']:,} |" for name, sizes in results["bytes"].items()]
    leaves = sorted({leaf for sizes in results["delta_tensor_bytes"].values() for leaf in sizes})
    experts = list(results["delta_tensor_bytes"])
    lines += ["", f"| bytes in the delta of | {' | '.join(experts)} |", f"| --- |{' ---: |' * len(experts)}"]
    for leaf in leaves:
        sizes = [results["delta_tensor_bytes"][name].get(leaf, 0) for name in experts]
        lines.append(f"| `{leaf}` | {' | '.join(f'{size:,}' for size in sizes)} |")
    return "\n".join(lines)


def times_table(results: dict[str, Any]) -> str:
    """Seconds of every stage."""
    lines = ["| stage | time |", "| --- | ---: |"]
    for name, summary in results["training"].items():
        lines.append(f"| fine-tuning {name} ({summary['steps']} steps) | {summary['seconds']} s |")
    for name, summary in results["compression"].items():
        lines.append(f"| compressing {name}, calibration included | {summary['seconds']} s |")
    for row in results["accuracy"]:
        lines.append(f"| {row['of']} {row['task']} answers, {row['model']} | {row['seconds']:.0f} s |")
    return "\n".join(lines)


#: Heading to the table under it, in the order of the page.
TABLES = {
    "Setting": setting_table,
    "Accuracy": accuracy_table,
    "Lost and won": paired_table,
    "Mixed batches": identity_table,
    "Size on disk": size_table,
    "Times": times_table,
}


def tables(results: dict[str, Any]) -> str:
    """All tables as Markdown, each under its heading."""
    return "\n\n".join(f"## {heading}\n\n{table(results)}" for heading, table in TABLES.items())


def transcript(results: dict[str, Any]) -> str:
    """The whole report as Markdown: tables, and the mixed batch row by row, each answer marked right or wrong."""
    lines = [
        "# SmolLM2-135M-Instruct: a family of two experts",
        "",
        tables(results),
        "",
        "## One mixed batch",
    ]
    for row in results["mixed_batch"]:
        lines += ["", f"### `expert={row['expert']!r}`", "", "Prompt:", "", "```text", row["prompt"], "```"]
        for label in ("answer", "full-precision expert", "base", "reference"):
            if row.get(label) is not None:
                verdict = {True: " (right)", False: " (wrong)", None: ""}[row.get("right", {}).get(label)]
                lines += ["", f"{label.capitalize()}{verdict}:", "", "```text", row[label], "```"]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], output_json: Path | None, markdown: Path | None) -> None:
    """Write the JSON and the transcript where they were asked for."""
    for path, text in ((output_json, json.dumps(results, indent=2) + "\n"), (markdown, transcript(results))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
