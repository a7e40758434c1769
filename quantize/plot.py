"""Quality against size, one point a variant."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from edge.errors import MissingExtra

from .report import Report

_FLOOR = 1e-6
"""Where an exact copy is drawn: nothing has no place on a logarithmic axis."""


def require_plotting() -> None:
    """Make sure, before hours of work, that its plot can be drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("quantize", needed_for="Drawing the plot of a report")


def _figure() -> Any:
    """A figure that draws without a display and without pyplot's global state."""
    require_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(axes: Any, report: Report) -> None:
    for i, variant in enumerate(sorted(report.variants, key=lambda v: v.quality.kld_mean.value)):
        size, kld = variant.size_bytes / 1e6, max(variant.quality.kld_mean.value, _FLOOR)
        axes.errorbar(size, kld, yerr=variant.quality.kld_mean.error, fmt="o", capsize=3, color="tab:blue")
        # Neighbours on the scale have their names on opposite sides, or they would lie over each other.
        side, align = (-8, "right") if i % 2 == 0 else (8, "left")
        axes.annotate(
            variant.type, (size, kld), (side, 0), textcoords="offset points", ha=align, va="center", fontsize=9
        )
    klds = [max(variant.quality.kld_mean.value, _FLOOR) for variant in report.variants]
    axes.set_yscale("log")
    axes.set_ylim(min(klds) / 3, max(klds) * 3)
    axes.margins(x=0.15)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.set_xlabel(f"file size, MB (the source, {report.source.precision}: {report.source.size_bytes / 1e6:,.1f} MB)")
    axes.set_ylabel("mean KL divergence to the source, nats a token")
    axes.set_title(f"{report.name}: quality against size (lower left is better)", fontsize=11)


def draw_plot(report: Report, svg: Path, png: Path) -> None:
    """Write the plot as SVG and PNG; the same report gives the same SVG.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: A file cannot be written.
    """
    figure = _figure()
    _draw(figure.subplots(), report)
    from matplotlib import rcParams

    rcParams["svg.hashsalt"] = report.name
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", metadata={"Software": None})
