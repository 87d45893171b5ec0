"""Tables and the plot of a result."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .family_example import confidence_interval
from .measures import difference_interval, from_bits

__all__ = ["markdown", "write_report"]

Cell = dict[str, Any]
_EXPERT = "expert"


def _right(cell: Cell) -> list[bool]:
    return from_bits(cell["correct"], cell["items"])


def bits_per_weight(cell: Cell) -> float:
    """Bits that a linear's weight takes, everything of the linears counted."""
    return 8 * float(cell["linear_bytes"]) / float(cell["linear_weights"])


def _pairs(cells: Iterable[Cell], references: dict[tuple[str, int], Cell]) -> tuple[list[bool], list[bool]]:
    """Items of the cells as their experts and as they themselves answered them."""
    expert: list[bool] = []
    method: list[bool] = []
    for cell in cells:
        reference = references.get((cell["expert"], cell["seed"]))
        # Items that only one of the two has answered are not paired.
        if reference is not None and reference["settings"]["items"] == cell["settings"]["items"]:
            expert += _right(reference)
            method += _right(cell)
    return expert, method


def _lost(cells: Iterable[Cell], references: dict[tuple[str, int], Cell]) -> str:
    """Expert − method in points, with its 95 % interval."""
    expert, method = _pairs(cells, references)
    if not expert:
        return "–"
    mean, half = difference_interval(expert, method)
    return f"{100 * mean:+.2f} ± {100 * half:.2f}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _row(label: str, cells: list[Cell], references: dict[tuple[str, int], Cell]) -> str:
    right, items = sum(cell["right"] for cell in cells), sum(cell["items"] for cell in cells)
    low, high = confidence_interval(right, items)
    seconds = _mean(cell.get("seconds") for cell in cells)
    peak = _mean(cell.get("peak_bytes") for cell in cells)
    compared: list[dict[str, Any]] = [cell["divergence"] for cell in cells if "divergence" in cell]
    kl, top1 = (_mean(found[key] for found in compared) for key in ("kl", "top1"))
    linear, rest = (round(_mean(cell[key] for cell in cells) or 0) for key in ("linear_bytes", "rest_bytes"))
    columns = [
        label,
        f"{linear:,}",
        f"{bits_per_weight(cells[0]):.2f}",
        f"{linear + rest:,}",
        f"{100 * right / items:.2f} ({100 * low:.1f}–{100 * high:.1f})",
        _lost(cells, references),
        "" if kl is None else f"{kl:.4f}",
        "" if top1 is None else f"{100 * top1:.2f}",
        "" if seconds is None else f"{seconds:.1f}",
        "" if peak is None else f"{peak / 2**20:,.0f}",
    ]
    return f"| {' | '.join(columns)} |"


_HEAD = (
    "| method | linears, bytes | bits a weight | all, bytes | exact match, % (95 %) | expert − method, points (95 %) "
    "| KL | top-1, % | seconds | peak, MiB |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def _seeds(cells: Iterable[Cell]) -> list[int]:
    return sorted({cell["seed"] for cell in cells})


def _seeds_in_words(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _table(cells: list[Cell], references: dict[tuple[str, int], Cell]) -> str:
    """One row a method, over all experts and seeds among ``cells``; ordered by bytes, the expert last.

    A method that was not measured on all seeds of the table says on which.
    """
    by_method: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_method[cell["method"]].append(cell)
    seeds = _seeds(cells)
    rows = []
    for name in sorted(by_method, key=lambda name: (bits_per_weight(by_method[name][0]), name)):
        own = _seeds(by_method[name])
        label = name if own == seeds else f"{name} ({_seeds_in_words(own)})"
        rows.append(_row(label, by_method[name], references))
    return "\n".join([_HEAD, *rows])


def markdown(result: dict[str, Any]) -> str:
    """A table for each task and strength, and one of all items pooled for each strength and over everything."""
    cells: list[Cell] = result["cells"]
    references = {(cell["expert"], cell["seed"]): cell for cell in cells if cell["method"] == _EXPERT}
    device, versions = result["device"], result["versions"]
    lines = [
        f"{result['base']}; {device}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{result['date']}.",
        "",
        "Greedy answers, the delta's output added to the base's in every layer; of `+merged`, of base + delta rounded "
        "to bfloat16, and of `+merged-prompts`, of that for prompts alone. Of `+int8` and `+int16`, what deltas are "
        "multiplied by is rounded about as the decode kernels do. The interval of expert − method is of paired items.",
    ]
    experts = sorted({cell["expert"] for cell in cells})
    for expert in experts:
        own = [cell for cell in cells if cell["expert"] == expert]
        lines += ["", f"## {expert}, {_seeds_in_words(_seeds(own))}", "", _table(own, references)]
    lines += ["", "## Pooled", ""]
    # A method that was not run on every expert would be pooled over easier or harder items than the others.
    everywhere = {(cell["expert"], cell["seed"]) for cell in cells}
    groups = {"all experts": cells}
    groups |= {
        f"{strength} experts": [cell for cell in cells if cell["strength"] == strength]
        for strength in sorted({cell["strength"] for cell in cells})
    }
    for label, group in list(groups.items()):
        # More methods were run on the first seed than on all of them.
        first = [cell for cell in group if cell["seed"] == min(_seeds(cells))]
        if len(first) < len(group):
            groups[f"{label} of {_seeds_in_words(_seeds(first))}"] = first
    for label, group in groups.items():
        wanted = {pair for pair in everywhere if pair in {(cell["expert"], cell["seed"]) for cell in group}}
        complete = [
            cell
            for cell in group
            if {(c["expert"], c["seed"]) for c in group if c["method"] == cell["method"]} == wanted
        ]
        if complete:
            lines += [f"### {label}", "", _table(complete, references), ""]
    return "\n".join(lines).rstrip() + "\n"


#: As many as share no factor with the ten colours, so that the first 70 methods all look different.
_MARKERS = "osD^vP*"


def plot(result: dict[str, Any], path: Path) -> None:
    """Exact match against the bytes of the linears' deltas, a panel an expert, the first seed of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells: list[Cell] = result["cells"]
    experts = sorted({cell["expert"] for cell in cells})
    columns = min(4, len(experts))
    rows = math.ceil(len(experts) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False)
    # The base is left out: it answers next to nothing, and its line would press the others together. So are variants,
    # such as other calibration text: they have the bytes of what they vary.
    shown = sorted({cell["method"] for cell in cells if not {"+", "@"} & set(cell["method"])} - {_EXPERT, "base"})
    styles = {name: (f"C{number % 10}", _MARKERS[number % len(_MARKERS)]) for number, name in enumerate(shown)}
    for panel in axes.flat[len(experts) :]:
        panel.set_visible(False)
    for panel, expert in zip(axes.flat, experts, strict=False):
        # One seed, since a method that was not run on all of them would be seen beside another expert's line.
        seed = min(cell["seed"] for cell in cells if cell["expert"] == expert)
        own = [cell for cell in cells if (cell["expert"], cell["seed"]) == (expert, seed)]
        points = {name: [cell for cell in own if cell["method"] == name] for name in (_EXPERT, *shown)}
        for name, group in points.items():
            if not group:
                continue
            share = 100 * sum(cell["right"] for cell in group) / sum(cell["items"] for cell in group)
            if name == _EXPERT:
                panel.axhline(share, color="black", linewidth=1, label=name)
                continue
            colour, marker = styles[name]
            size = group[0]["linear_bytes"] / 2**20
            panel.plot(size, share, marker, color=colour, markersize=9 if name.startswith("ours") else 6, label=name)
        panel.set(title=f"{expert}, seed {seed}", xlabel="linears of the delta, MiB", ylabel="exact match, %")
        panel.grid(alpha=0.3)
    drawn = [panel.get_legend_handles_labels() for panel in axes.flat]
    handles = {label: handle for found in drawn for handle, label in zip(*found, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.03 + 0.045 * math.ceil(len(handles) / 5) * 3 / (3.4 * rows), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(result: dict[str, Any], markdown_path: Path | None, plot_path: Path | None) -> None:
    """Print the tables, and write them and the plot where asked."""
    text = markdown(result)
    print(text)
    if markdown_path is not None:
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(text, encoding="utf-8")
    if plot_path is not None:
        plot(result, plot_path)
