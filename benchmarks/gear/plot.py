"""Plots of figures, as SVG. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Letters stay letters and names do not change: a plot is small, and differs where its figures do.
SVG = {"svg.fonttype": "none", "svg.hashsalt": "rerankq", "font.family": "sans-serif"}


def bars(title: str, figures: Mapping[str, float], *, unit: str) -> str:
    """Draw one horizontal bar per figure, in their order.

    >>> "1,234 pairs/s" in bars("rate", {"ours": 1234, "theirs": 1}, unit="pairs/s")
    True
    """
    figure, axes = _axes(title, height=0.8 + 0.35 * len(figures))
    drawn = axes.barh(list(figures), list(figures.values()), color=[f"C{row}" for row in range(len(figures))])
    axes.bar_label(drawn, [f"{value:,.4g} {unit}" for value in figures.values()], padding=4)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.margins(x=0.2)
    return _svg(figure)


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, across: str, up: str) -> str:
    """Draw one line per name over a logarithmic axis; upwards from zero.

    >>> "submit" in curves("cost", {"submit": [(1, 2), (1000, 3)]}, across="jobs", up="µs")
    True
    """
    figure, axes = _axes(title, height=3.2)
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), marker=".", label=name)
    axes.set(xscale="log", xlabel=across, ylabel=up, ylim=(0, None))
    axes.legend(frameon=False)
    return _svg(figure)


def _axes(title: str, *, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    written = StringIO()
    with mpl.rc_context(SVG):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
