"""Line charts as SVG text, drawn from plain numbers.

A chart is data in, text out: no plotting library, no script, nothing fetched, so a page that holds it works from a
mail attachment in ten years. The page's style sheet gives the colours, which is how one drawing serves light and dark.
Reading values needs no script either: every plotted step owns an invisible column; hovering or tapping it shows a guide
line, the points and their values, and the column's ``<title>`` says the same to screen readers.

A run of a million steps must still give a page of some hundred kilobytes. Long series are thinned to buckets, and of
each bucket the lowest and the highest value are kept: spikes stay, and every drawn number is one that was logged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TypeGuard

Point = tuple[int, float | None]
"""A step and its value; None (or a value that is not finite) is a gap in the line."""

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 30
MAX_POINTS = 240
"""Points a series after thinning."""
NUM_COLOURS = 6
"""Classes ``s0`` to ``s5``, which the page colours; further series start again."""

_SMOOTH_FROM = 40
"""A shorter series is drawn as it is."""


@dataclass(frozen=True)
class Series:
    """One line of a chart. ``smooth`` adds a running mean over a faint line of the values themselves."""

    name: str
    points: Sequence[Point]
    smooth: bool = False
    dots: bool = False
    """Mark every point, for series of few values such as validation losses."""


@dataclass(frozen=True)
class _Frame:
    """The mapping from data to the drawing's coordinates."""

    x_min: float
    x_max: float
    y_ticks: Sequence[float]
    """The scale runs from the first to the last of them."""

    def x(self, step: float) -> float:
        return LEFT + (step - self.x_min) / (self.x_max - self.x_min) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(series: Sequence[Series], *, label: str, from_zero: bool = False) -> str:
    """Draw ``series`` over their steps.

    Args:
        series: at least one finite value in all (see :func:`has_values`).
        label: what the chart shows, for screen readers.
        from_zero: let the scale stand on zero, for amounts whose small changes mean nothing.
    """
    thinned = [thin(line.points) for line in series]
    frame = _frame(thinned, from_zero)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        _axes(frame),
    ]
    for index, (line, points) in enumerate(zip(series, thinned, strict=True)):
        is_smooth = line.smooth and len(line.points) >= _SMOOTH_FROM
        css = f"line s{index % NUM_COLOURS}"
        parts.append(_path(points, frame, f"{css} raw" if is_smooth else css))
        if is_smooth:
            parts.append(_path(thin(running_mean(line.points)), frame, css))
        lonely = _lonely(points)
        parts += [
            _dot(index, frame.x(step), frame.y(value), 2.5)
            for position, (step, value) in enumerate(points)
            if _is_finite(value) and (line.dots or position in lonely)
        ]
    parts.append(_columns([line.name for line in series], thinned, frame))
    parts.append("</svg>")
    return "".join(parts)


def has_values(series: Sequence[Series]) -> bool:
    """Tell whether anything can be drawn."""
    return any(_is_finite(value) for line in series for _, value in line.points)


def thin(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """Return at most ``max_points`` of ``points`` in order: first, last, and the extremes of equal buckets between."""
    if len(points) <= max_points:
        return list(points)
    inner = points[1:-1]
    num_buckets = (max_points - 2) // 2
    kept = [points[0]]
    for bucket in range(num_buckets):
        start, end = bucket * len(inner) // num_buckets, (bucket + 1) * len(inner) // num_buckets
        finite = [(value, i) for i, (_, value) in enumerate(inner[start:end], start) if _is_finite(value)]
        if finite:
            kept += [inner[i] for i in sorted({min(finite)[1], max(finite)[1]})]
        else:
            kept.append(inner[start])
    kept.append(points[-1])
    return kept


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Return a mean over the surrounding twenty-fifth of the series, gaps left out."""
    half = max(1, len(points) // 50)
    total, counts = [0.0], [0]
    for _, value in points:
        total.append(total[-1] + (value if _is_finite(value) else 0.0))
        counts.append(counts[-1] + _is_finite(value))
    means: list[Point] = []
    for i, (step, _) in enumerate(points):
        start, end = max(0, i - half), min(len(points), i + half + 1)
        count = counts[end] - counts[start]
        means.append((step, (total[end] - total[start]) / count if count else None))
    return means


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers that cover ``low`` to ``high``, outer ones included."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [tick * step for tick in range(first, last + 1)]


def format_number(value: float) -> str:
    """Write a value with five digits or, from 1,000 on, as a whole number: ``1.2345e-05``, ``1.2345``, ``12,345``."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.5g}"


def _tick_label(value: float) -> str:
    size = abs(value)
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.4g}{unit}"
    return f"{value:.4g}" if size >= 1e-3 or size < 1e-12 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) < 1e300  # false for nan; differences of such values stay finite too


def _frame(lines: Sequence[Sequence[Point]], from_zero: bool) -> _Frame:
    steps = [step for points in lines for step, _ in points]
    values = [value for points in lines for _, value in points if _is_finite(value)]
    low, high = min(values), max(values)
    if low >= 0 and (from_zero or low < 0.35 * high):
        low = 0.0  # a scale that nearly reaches zero may as well stand on it
    if high - low < 1e-12 * max(abs(high), 1e-300):
        margin = abs(high) * 0.5 or 1.0
        low, high = (0.0, high + margin) if low >= 0 else (low - margin, high + margin)
    x_min, x_max = min(steps), max(steps)
    if x_min == x_max:
        x_min, x_max = x_min - 1, x_max + 1
    return _Frame(x_min, x_max, nice_ticks(low, high, 4))


def _axes(frame: _Frame) -> str:
    parts = []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick_label(tick)}</text>')
    for tick in nice_ticks(frame.x_min, frame.x_max, 5):
        if frame.x_min <= tick <= frame.x_max and tick == int(tick):
            x = frame.x(tick)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                f"{_tick_label(tick)}</text>"
            )
    return "".join(parts)


def _path(points: Sequence[Point], frame: _Frame, css: str) -> str:
    """Draw the line; a value that is missing lifts the pen."""
    commands, pen_down = [], False
    for step, value in points:
        if _is_finite(value):
            commands.append(f"{'L' if pen_down else 'M'}{frame.x(step):.1f} {frame.y(value):.1f}")
        pen_down = _is_finite(value)
    return f'<path class="{css}" d="{"".join(commands)}"/>'


def _dot(index: int, x: float, y: float, radius: float) -> str:
    return f'<circle class="dot s{index % NUM_COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _lonely(points: Sequence[Point]) -> set[int]:
    """Return the positions of values with a gap on both sides, which a line cannot show."""
    finite = [False, *(_is_finite(value) for _, value in points), False]
    return {i for i in range(len(points)) if finite[i + 1] and not finite[i] and not finite[i + 2]}


def _columns(names: Sequence[str], lines: Sequence[Sequence[Point]], frame: _Frame) -> str:
    """Draw one invisible column for each plotted step, with what it shows when it is pointed at."""
    by_step: dict[int, list[tuple[int, float | None]]] = {}
    for index, points in enumerate(lines):
        for step, value in points:
            by_step.setdefault(step, []).append((index, value))
    steps = sorted(by_step)
    centres = [frame.x(step) for step in steps]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(centres)), WIDTH - RIGHT]
    parts = []
    for position, step in enumerate(steps):
        texts, dots = [f"step {step}"], []
        for index, value in by_step[step]:
            texts.append(f"{names[index]} {format_number(value) if _is_finite(value) else 'not finite'}")
            if _is_finite(value):
                dots.append(_dot(index, centres[position], frame.y(value), 3.5))
        text = escape(" · ".join(texts))
        x, width = edges[position], edges[position + 1] - edges[position]
        parts.append(
            f'<g class="at"><title>{text}</title>'
            f'<rect x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<line x1="{centres[position]:.1f}" x2="{centres[position]:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'{"".join(dots)}<text class="tip" x="{WIDTH - RIGHT}" y="{TOP - 12}" text-anchor="end">{text}</text></g>'
        )
    return "".join(parts)
