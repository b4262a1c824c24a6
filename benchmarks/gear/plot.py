"""Plots as SVG, written by hand: a few lines need no library. Pure functions of figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, ROW = 720, 210, 110, 30
HEIGHT, TOP, BOTTOM = 320, 40, 40
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569")


def bars(title: str, figures: Mapping[str, float], *, unit: str) -> str:
    """Draw one horizontal bar per figure, longest = greatest.

    >>> bars("pace", {"ours": 3, "theirs": 1}, unit="pairs/s").count("<rect")
    3
    """
    most = max(figures.values(), default=0) or 1
    drawn = []
    for row, (name, figure) in enumerate(figures.items()):
        y = TOP + row * ROW
        length = (WIDTH - LEFT - RIGHT) * figure / most
        drawn += [
            _text(LEFT - 8, y + 16, name, anchor="end"),
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 8}" fill="{COLOURS[row % len(COLOURS)]}"/>',
            _text(LEFT + length + 6, y + 16, f"{figure:,.4g} {unit}"),
        ]
    return _picture(title, drawn, TOP + len(figures) * ROW + 10)


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, across: str, up: str) -> str:
    """Draw one line per name over a logarithmic axis; upwards from zero.

    >>> curves("cost", {"submit": [(1, 2), (1000, 3)]}, across="jobs", up="µs").count("<polyline")
    1
    """
    points = [point for line in lines.values() for point in line]
    least, most = (math.log(limit(x for x, _ in points)) for limit in (min, max))
    highest = max(y for _, y in points) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - least) / ((most - least) or 1)
        return 70 + share * (WIDTH - 70 - 180), HEIGHT - BOTTOM - y / highest * (HEIGHT - TOP - BOTTOM)

    drawn = [_text(*_below(place(x, 0)), f"{x:,.0f}", anchor="middle") for x in sorted({x for x, _ in points})]
    drawn += [_text(64, place(points[0][0], y)[1] + 4, f"{y:,.4g}", anchor="end") for y in (0, highest / 2, highest)]
    drawn += [_text(WIDTH / 2 - 60, HEIGHT - 6, across, anchor="middle"), _text(8, TOP - 8, up)]
    ends = {name: place(*line[-1]) for name, line in lines.items()}
    heights = dict(zip(ends, apart([y for _, y in ends.values()]), strict=True))
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn.append(_text(ends[name][0] + 6, heights[name] + 4, name, fill=colour))
    return _picture(title, drawn, HEIGHT)


def apart(heights: Sequence[float], gap: float = 15) -> list[float]:
    """Move heights up until each is a gap from the next below, so that words at them can be read.

    >>> apart([100, 50, 98])
    [100, 50, 85]
    """
    moved = list(heights)
    before = math.inf
    for at in sorted(range(len(moved)), key=lambda at: -moved[at]):
        before = moved[at] = min(moved[at], before - gap)
    return moved


def _below(point: tuple[float, float]) -> tuple[float, float]:
    return point[0], point[1] + 16


def _text(x: float, y: float, words: str, *, anchor: str = "start", fill: str = "#111") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


def _picture(title: str, drawn: Sequence[str], height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
    paper = f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    return "\n".join([f'{head} font-size="13">', paper, _text(12, 22, title), *drawn, "</svg>"]) + "\n"
