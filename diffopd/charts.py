"""Small charts as inline SVG: lines over a log scale, one stacked bar, a score with its interval.

The drawing stretches with the page (strokes do not); every word is HTML beside it, so text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from markupsafe import Markup

MAX_POINTS = 600  # drawn per line; a longer run is thinned, which no screen shows
END_GAP = 7.0  # smallest distance between two labels at the right, per cent of the height
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. points: (x, y) in order of x; color: any CSS colour."""

    label: str
    points: Sequence[Point]
    color: str

    def drawable(self) -> Series:
        """Without the points that a log scale cannot show."""
        return Series(self.label, [(x, y) for x, y in self.points if y and 0 < y < math.inf], self.color)


@dataclass(frozen=True)
class Scale:
    """Data to per cent of the plot's width and height, y on a log scale with 0 at the top."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[Point]) -> Scale:
        """The scale that holds all points, with a margin above and below; y must be positive."""
        xs, ys = zip(*points, strict=True)
        low, high = math.log10(min(ys)), math.log10(max(ys))
        margin = max(0.06 * (high - low), 0.04)
        return cls(min(xs), max(xs), low - margin, high + margin)

    def x(self, value: float) -> float:
        """Per cent from the left; the middle where the width is 0."""
        return 100 * (value - self.left) / (self.right - self.left) if self.right > self.left else 50.0

    def y(self, value: float) -> float:
        """Per cent from the top of a positive value."""
        return 100 * (self.high - math.log10(value)) / (self.high - self.low)

    def x_ticks(self) -> list[float]:
        """At most six round numbers; whole ones, for updates are counted."""
        return round_numbers(self.left, self.right, smallest_step=1)

    def y_ticks(self) -> list[float]:
        """Decades where there are three or more, else 1-2-5, else (for a flat line) any round numbers."""
        exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
        inside = [e for e in exponents if self.low <= e <= self.high]
        if len(inside) >= 3:
            return [10.0**e for e in inside[:: math.ceil(len(inside) / 6)]]
        ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5) if self.low <= math.log10(m) + e <= self.high]
        return ticks if len(ticks) >= 3 else round_numbers(10**self.low, 10**self.high)


def round_numbers(low: float, high: float, *, smallest_step: float = 0.0) -> list[float]:
    """At most six multiples of 1, 2 or 5 times a power of ten, between low and high."""
    span = max(high - low, smallest_step)
    unit = 10.0 ** math.floor(math.log10(span / 5))
    step = max(smallest_step, next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 5))
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_chart(series: Sequence[Series], *, smooth: bool = True, dots: bool = False, ends: bool = False) -> Markup:
    """Lines over a log y axis, empty where nothing can be drawn.

    smooth: an exponential average in front, the raw values pale behind it. dots: every point marked.
    ends: labels at the lines' right ends instead of a legend above.
    """
    shown = [line for line in (item.drawable() for item in series) if line.points]
    if not shown:
        return Markup("")
    scale = Scale.around([point for line in shown for point in line.points])
    fronts = [smoothed(line) if smooth else line for line in shown]
    raw = [_line(line, scale, "raw") for line, front in zip(shown, fronts, strict=True) if front is not line]
    drawn = raw + [_line(line, scale, "front") for line in fronts]
    marked = [line for line in fronts if dots or len(line.points) == 1]
    drawn += [_dot(point, line.color, scale) for line in marked for point in line.points]
    legend = Markup("") if ends else _legend(fronts)
    labels = _end_labels(fronts, scale) if ends else Markup("")
    return Markup('{}<div class="chart">{}{}<svg {}>{}</svg></div>').format(
        legend, _axes(scale), labels, _STRETCHED, Markup("").join(drawn)
    )


def smoothed(series: Series) -> Series:
    """Running geometric mean over a twentieth of the line, centred so that it does not lag behind.

    A line of under 20 points is returned as it is.
    """
    count = len(series.points)
    if count < 20:
        return series
    sums = [0.0, *accumulate(math.log(y) for _, y in series.points)]
    reach = min(max(count // 40, 1), 25)
    points = []
    for at, (x, _) in enumerate(series.points):
        first, last = max(at - reach, 0), min(at + reach + 1, count)
        points.append((x, math.exp((sums[last] - sums[first]) / (last - first))))
    return Series(series.label, points, series.color)


def stacked_bar(parts: Sequence[tuple[str, float, str]]) -> Markup:
    """One bar of (label, value, colour) parts, left to right; empty where all values are 0."""
    total = sum(value for _, value, _ in parts)
    if not total:
        return Markup("")
    rects, at = [], 0.0
    for label, value, color in parts:
        share = 100 * value / total
        rect = '<rect x="{:.3f}" y="0" width="{:.3f}" height="100" style="fill:{}"><title>{} {:.1f} %</title></rect>'
        rects.append(Markup(rect).format(at, share, color, label, share))
        at += share
    return Markup('<div class="bar"><svg {}>{}</svg></div>').format(_STRETCHED, Markup("").join(rects))


def interval_bar(value: float, interval: Sequence[float] | None, *, end: float = 1.0) -> Markup:
    """A bar from 0 to `value` on a track from 0 to `end`, with its interval as a whisker."""
    at, low, high = (100 * min(max(x, 0), end) / end for x in (value, *(interval or (value, value))))
    lines = [(0, 100, "track"), (0, at, "value"), (low, high, "whisker")]
    drawn = [
        Markup('<line x1="{:.2f}" x2="{:.2f}" y1="50" y2="50" class="{}"/>').format(a, b, kind) for a, b, kind in lines
    ]
    return Markup('<svg class="interval" {}>{}</svg>').format(_STRETCHED, Markup("").join(drawn))


_STRETCHED = Markup('viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"')


def _line(series: Series, scale: Scale, kind: str) -> Markup:
    points = series.points[:: math.ceil(len(series.points) / MAX_POINTS)]
    if points[-1] != series.points[-1]:
        points = [*points, series.points[-1]]
    path = " ".join(f"{scale.x(x):.2f},{scale.y(y):.2f}" for x, y in points)
    return Markup('<polyline points="{}" class="{}" style="stroke:{}"/>').format(path, kind, series.color)


def _dot(point: Point, color: str, scale: Scale) -> Markup:
    """A line of no length with round caps: a circle that does not stretch."""
    x, y = scale.x(point[0]), scale.y(point[1])
    dot = '<line x1="{:.2f}" x2="{:.2f}" y1="{:.2f}" y2="{:.2f}" class="dot" style="stroke:{}"/>'
    return Markup(dot).format(x, x, y, y, color)


def _axes(scale: Scale) -> Markup:
    row = Markup('<i class="y" style="top:{:.2f}%"><span>{:g}</span></i>')
    column = Markup('<i class="x" style="left:{:.2f}%">{:,.0f}</i>')
    rows = [row.format(scale.y(tick), tick) for tick in scale.y_ticks()]
    columns = [column.format(scale.x(tick), tick) for tick in scale.x_ticks()]
    return Markup("").join(rows + columns)


def _legend(series: Sequence[Series]) -> Markup:
    items = [
        Markup('<li><b style="background:{}"></b>{} <small>{:.3g}</small></li>').format(
            s.color, s.label, s.points[-1][1]
        )
        for s in series
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _end_labels(series: Sequence[Series], scale: Scale) -> Markup:
    ordered = sorted(series, key=lambda line: scale.y(line.points[-1][1]))
    places = list(_spread([scale.y(line.points[-1][1]) for line in ordered]))
    label = '<i class="end" style="top:{:.2f}%;color:{}">{}</i>'
    return Markup("").join(
        Markup(label).format(place, line.color, line.label) for place, line in zip(places, ordered, strict=True)
    )


def _spread(places: list[float]) -> Iterator[float]:
    """The same sorted places, pushed down where two would overlap and back up where the last left the plot."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + END_GAP) if moved else place)
    moved[-1:] = [min(moved[-1], max(100.0, END_GAP * (len(moved) - 1)))]
    for after, before in pairwise(range(len(moved) - 1, -1, -1)):
        moved[before] = min(moved[before], moved[after] - END_GAP)
    return iter(moved)
