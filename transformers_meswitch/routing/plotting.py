"""Pictures of a router: confusion matrix and calibration curve. Data in, matplotlib figure out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plotting import require_matplotlib
from .evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["router_figure"]

_BLUE, _GREY = "#0072B2", "#8A9BA8"
#: Inches for the frame and for each row of the matrix.
_WIDTH, _ROW, _LEAST_HEIGHT = 10.0, 0.45, 4.0
#: Most labels whose counts are still readable in the cells.
_MOST_COUNTS = 16


def router_figure(evaluation: Evaluation) -> Figure:
    """The confusion matrix, and beside it how often the router is right when it is so sure.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height = max(_LEAST_HEIGHT, _ROW * len(evaluation.labels) + 2)
    figure = Figure(figsize=(_WIDTH, height), dpi=150)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    matrix, curve = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_matrix(matrix, evaluation)
    _draw_curve(curve, evaluation)
    return figure


def _draw_matrix(axes: Axes, evaluation: Evaluation) -> None:
    counts = evaluation.confusion
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    columns = [*evaluation.labels, "abstained"]
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(evaluation.labels)), evaluation.labels)
    if len(evaluation.labels) <= _MOST_COUNTS:
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                colour = "white" if float(shares[i, j]) > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=9)
    axes.set_xlabel("routed to")
    axes.set_ylabel("right expert")
    routed = f"{evaluation.coverage:.1%} routed, of which {evaluation.routed_accuracy:.1%} right"
    axes.set_title(f"{int(counts.sum()):,} prompts, {routed}", loc="left", fontsize=10)


def _draw_curve(axes: Axes, evaluation: Evaluation) -> None:
    bins = evaluation.calibration
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, linestyle="--", label="as often as it says")
    most = max(one.prompts for one in bins)
    sizes = [20 + 180 * one.prompts / most for one in bins]
    x, y = [one.confidence for one in bins], [one.accuracy for one in bins]
    axes.plot(x, y, color=_BLUE, lw=1)
    axes.scatter(x, y, s=sizes, color=_BLUE, label="prompts (area: how many)")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("probability of the likeliest expert")
    axes.set_ylabel("share right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.set_title(f"Calibration error {evaluation.calibration_error:.1%}", loc="left", fontsize=10)
