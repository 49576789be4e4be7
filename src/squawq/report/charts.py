"""The report's charts as plain values: lines, bars from a low to a high value, heat maps.

Takes numbers and names, gives places and classes; the template turns them into SVG. Knows no report and no HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from squawq.report.scales import HEIGHT, Axis, Tick, centres, column_ticks, number

DOTS = 64  # points that still are drawn one by one
ROW = 22  # pixels of a map's row
LETTER = 6.5  # pixels of a letter beside a map, no less than any usual font has
NAME = 28  # letters of a row's name that fit beside a map on a phone; its end tells the most
Values = Sequence[float | None]


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """`path`: the points of unbroken stretches, x of 1000, y in pixels."""

    label: str
    kind: str
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Bar:
    """A thin bar from top to bottom, a thicker one inside it, and a mark, in pixels down."""

    x: float
    width: float
    title: str
    outer: tuple[float, float]
    inner: tuple[float, float]
    mark: float


@dataclass(frozen=True)
class Cell:
    """`kind` is the colour's class, `strength` 0 to 1 its opacity."""

    x: float
    y: int
    width: float
    kind: str
    strength: float
    title: str


@dataclass(frozen=True)
class Chart:
    """Lines or bars over columns. `across` names the columns."""

    title: str
    across: str
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    lines: list[Line] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    height: int = HEIGHT
    gutter: int = 56


@dataclass(frozen=True)
class Map:
    """Rows of coloured cells over columns, and what the colours mean. gutter: pixels for the rows' names."""

    title: str
    across: str
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    cells: list[Cell]
    legend: list[Cell]
    height: int
    gutter: int


def lines(
    title: str, across: str, columns: list[str], series: Mapping[tuple[str, str], Values], *, log: bool = False
) -> Chart:
    """A line for each (label, kind), a value for each column; None leaves a gap."""
    axis = Axis.over((v for values in series.values() for v in values if v is not None), log)
    places = centres(len(columns))
    drawn = []
    for (label, kind), values in series.items():
        points = [
            None if value is None else Dot(x, axis.place(value), f"{across} {name}: {number(value)} ({label})")
            for x, name, value in zip(places, columns, values, strict=True)
        ]
        dots = [p for p in points if p is not None] if len(points) <= DOTS else []
        drawn.append(Line(label, kind, _path(points), dots))
    return Chart(title, across, axis.ticks(), column_ticks(columns), lines=drawn)


def _path(points: Sequence[Dot | None]) -> str:
    steps, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
        else:
            steps.append(f"{pen}{point.x * 10:g} {point.y:g}")
            pen = "L"
    return "".join(steps)


def amounts(title: str, across: str, columns: list[str], values: Values, unit: str) -> Chart:
    """A bar from zero for each column."""
    axis = Axis.over([v for v in values if v is not None])
    zero = axis.place(0)
    bars = [
        Bar(x, 80 / len(columns), f"{across} {name}: {number(v)}{unit}", (zero, zero), (axis.place(v), zero), zero)
        for x, name, v in zip(centres(len(columns)), columns, values, strict=True)
        if v is not None
    ]
    return Chart(title, across, axis.ticks(unit), column_ticks(columns), bars=bars)


def ranges(title: str, across: str, columns: list[str], rows: Sequence[tuple[Sequence[float], str] | None]) -> Chart:
    """Five quantiles (least, 5 %, median, 95 %, most) and a word for each column, on a logarithmic axis."""
    axis = Axis.over((v for row in rows if row is not None for v in row[0]), log=True)
    bars = []
    for x, name, row in zip(centres(len(columns)), columns, rows, strict=True):
        if row is not None:
            least, low, median, high, most = map(axis.place, row[0])
            words = f"{across} {name}: {row[1]}, {' · '.join(map(number, row[0]))}"
            bars.append(Bar(x, 60 / len(columns), words, (most, least), (high, low), median))
    return Chart(title, across, axis.ticks(), column_ticks(columns), bars=bars)


def heat_map(
    title: str,
    across: str,
    columns: list[str],
    rows: Mapping[str, Values],
    paint: Callable[[float], tuple[str, float]],
    legend: Sequence[tuple[float, str]],
    words: Callable[[float], str],
) -> Map:
    """A row of cells for each name. paint: a value's colour class and opacity; words: a value as text."""
    width = 100 / len(columns)
    cells = [
        Cell(round(i * width, 3), y * ROW, width, *paint(value), f"{name}, {across} {columns[i]}: {words(value)}")
        for y, (name, values) in enumerate(rows.items())
        for i, value in enumerate(values)
        if value is not None
    ]
    samples = [Cell(0, 0, 100, *paint(value), label) for value, label in legend]
    names = [
        Tick((y + 0.5) * ROW, name if len(name) <= NAME else f"…{name[1 - NAME :]}") for y, name in enumerate(rows)
    ]
    gutter = round(10 + LETTER * max(len(name.label) for name in names))
    return Map(title, across, names, column_ticks(columns), cells, samples, len(rows) * ROW, gutter)


def paint_ratio(ratio: float) -> tuple[str, float]:
    """Less than 1 is good, more is bad; an eighth and eight times are the strongest."""
    power = math.log2(max(ratio, 1e-9))
    return ("good" if power < 0 else "bad"), round(min(1.0, abs(power) / 3), 3)


def paint_share(share: float) -> tuple[str, float]:
    """The more of a range is cut away, the stronger; half of it is the strongest."""
    return "cut", round(min(1.0, max(0.0, 1 - share) * 2), 3)
