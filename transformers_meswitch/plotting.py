"""Pictures of a delta: channel ranges, error per layer, bytes per kind of module. Data in, matplotlib figure out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .channels import ChannelRanges
    from .inspection import Inspection, ModuleRow

__all__ = ["bytes_by_kind", "delta_figure", "require_matplotlib"]

#: Okabe and Ito's palette, which the colour-blind tell apart, without its yellow, too pale for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_OTHERS, _SALIENT = "#8A9BA8", "#D55E00"
#: Inches; at 100 dots an inch as wide as GitHub shows a README.
_WIDTH, _PANEL_HEIGHT = 9.0, 3.2
_DOTS_PER_INCH = 150


def require_matplotlib() -> None:
    """Fail early where there is no matplotlib.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "Plots need matplotlib, which is not installed: pip install 'transformers-meswitch[plot]'"
        ) from error


def bytes_by_kind(inspection: Inspection) -> dict[str, int]:
    """Kind of module (``"mlp.down_proj"``, ``"norms"``) to its bytes on disk, most first; headers come last.

    Args:
        inspection: a counted delta.
    """
    totals: dict[str, int] = {}
    for row in inspection.modules:
        kind = _kind(row)
        totals[kind] = totals.get(kind, 0) + row.bytes
    ordered = dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))
    return {**ordered, "headers, configuration": inspection.overhead_bytes}


def delta_figure(inspection: Inspection, channels: ChannelRanges | None) -> Figure:
    """The pictures of a delta, one below the other.

    Args:
        inspection: a counted delta; the error of each layer is shown if it was measured.
        channels: one layer's channels; `None` leaves that picture out.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    measured = [row for row in inspection.modules if row.relative_error is not None]
    panels = (channels is not None) + bool(measured) + 1
    figure = Figure(figsize=(_WIDTH, _PANEL_HEIGHT * panels), dpi=_DOTS_PER_INCH)
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    axes = iter(figure.subplots(panels, squeeze=False)[:, 0])
    if channels is not None:
        _draw_channels(next(axes), channels)
    if measured:
        _draw_errors(next(axes), measured)
    _draw_bytes(next(axes), inspection)
    return figure


def _plain_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _draw_channels(axes: Axes, channels: ChannelRanges) -> None:
    """Lowest to highest weight of each input channel, salient ones marked."""
    low, high = channels.minimum.numpy(), channels.maximum.numpy()
    salient = sorted(channels.salient.tolist())
    others = sorted(set(range(len(low))) - set(salient))
    # Thin where there are many, but never so thin that a channel vanishes.
    width = min(3.0, max(0.6, 500 / len(low)))
    axes.vlines(others, low[others], high[others], color=_OTHERS, lw=width, label=f"{len(others):,} coded channels")
    if salient:
        axes.vlines(salient, low[salient], high[salient], color=_SALIENT, lw=max(width, 1.2))
        label = f"{len(salient):,} salient channels, kept in bfloat16"
        axes.plot(salient, high[salient], "v", color=_SALIENT, markersize=5, label=label)
    axes.axhline(0, color="black", lw=0.5)
    axes.set_xlim(-1, len(low))
    bottom, top = float(low.min()), float(high.max())
    if bottom < top:
        axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.3 * (top - bottom))  # room for the legend
    axes.set_xlabel("input channel")
    axes.set_ylabel("weight of the delta,\nlowest to highest")
    what = "expert − base" if channels.exact else "the delta's reconstruction, not expert − base"
    _plain_axes(axes, f"Range of each input channel: {channels.module}\n({what})")
    legend = axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=9)
    for line in legend.get_lines():
        line.set_linewidth(2)  # as thin as one of thousands of channels, it would show no colour


def _draw_errors(axes: Axes, measured: Sequence[ModuleRow]) -> None:
    """Relative error by layer of the model, one line a kind of module."""
    from matplotlib.ticker import MaxNLocator

    series: dict[str, list[tuple[float, float]]] = {}
    layers = [layer for row in measured if (layer := _layer(row.module)) is not None]
    beyond = max(layers, default=-1) + 1  # for modules outside the layers, such as an output head
    for row in measured:
        layer = _layer(row.module)
        assert row.relative_error is not None
        series.setdefault(_kind(row), []).append((beyond if layer is None else layer, row.relative_error))
    for i, (kind, points) in enumerate(series.items()):
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        axes.plot(x, y, markersize=5, lw=1, alpha=0.85, label=kind, **style)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer of the model")
    axes.set_ylabel("relative error ‖Δ − Δ̂‖ / ‖Δ‖")
    axes.grid(axis="y", color="#DDDDDD", lw=0.6)
    _plain_axes(axes, "Error of the weights, layer by layer")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def _draw_bytes(axes: Axes, inspection: Inspection) -> None:
    """Bytes on disk by kind of module."""
    sizes = bytes_by_kind(inspection)
    unit, name = _unit(max(sizes.values()))
    bars = axes.barh(list(sizes), [size / unit for size in sizes.values()], color=_COLOURS[0], height=0.7)
    shares = [f"{_in_unit(size)} ({size / inspection.total_bytes:.1%})" for size in sizes.values()]
    axes.bar_label(bars, shares, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel(f"{name} on disk")
    _plain_axes(axes, f"Bytes by kind of module: {inspection.total_bytes:,} in all")


def _unit(size: int) -> tuple[int, str]:
    return next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if size >= u), (1, "bytes"))


def _in_unit(size: int) -> str:
    unit, name = _unit(size)
    return f"{size / unit:.3g} {name}"


def _layer(module: str) -> int | None:
    """Number of the layer that a module is in: ``model.layers.3.mlp`` gives 3."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def _kind(row: ModuleRow) -> str:
    """Name of a module without what it shares with modules of other layers."""
    if row.kind == "values":
        return "norms"
    parts = row.module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else parts[-1]
