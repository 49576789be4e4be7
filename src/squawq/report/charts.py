"""The report's charts as plain values: lines, bars from a low to a high value, heat maps, and their axes.

Takes numbers and names, gives places and classes; the template turns them into SVG. Across, places are per cent of the
drawing's width, so that a drawing fits any screen; down, they are pixels. Knows no report and no HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

HEIGHT = 200  # pixels of a chart's inside
MARGIN = 8  # pixels left free above and below the values
DOTS = 64  # points that still are drawn one by one
ROW = 22  # pixels of a map's row
LETTER = 6.5  # pixels of a letter beside a map, no less than any usual font has
NAME = 28  # letters of a row's name that fit beside a map on a phone; its end tells the most
Values = Sequence[float | None]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place (pixels down, or per cent across) and what stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Values upwards from `low` to `high`, on a logarithmic scale or a plain one."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Iterable[float], log: bool = False) -> Axis:
        """An axis that holds all values; plain ones begin at zero, logarithmic ones leave out what is not above it."""
        usable = [v for v in values if v > 0] if log else list(values)
        if not usable:
            return cls(1.0 if log else 0.0, 10.0 if log else 1.0, log)
        low, high = (min(usable) if log else 0.0), max(usable)
        if log and high < 4 * low:  # nearly one value: an axis of some width around it
            low, high = low / 2, high * 2
        return cls(low, high if high > low else low + 1, log)

    def place(self, value: float) -> float:
        """Pixels from the top; what lies beyond the axis is drawn at its end."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            share = (math.log(max(value, self.low)) - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(MARGIN + (HEIGHT - 2 * MARGIN) * (1 - min(max(share, 0.0), 1.0)), 1)

    def ticks(self, unit: str = "") -> list[Tick]:
        """At most six round values."""
        values = _log_values(self.low, self.high) if self.log else _plain_values(self.low, self.high)
        return [Tick(self.place(value), f"{number(value)}{unit}") for value in values]


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


def _log_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten, or ever sparser powers of ten, whichever first gives six or fewer."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[m * 10.0**p for p in powers for m in (1, 2, 5)]]
    choices += [[10.0**p for p in powers if p % step == 0] for step in range(1, len(powers) + 1)]
    inside = ([v for v in values if low * 0.999 <= v <= high * 1.001] for values in choices)
    return next(values for values in inside if len(values) <= 6)


def _plain_values(low: float, high: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(s * power for s in (0.2, 0.5, 1, 2, 5) if (high - low) / (s * power) <= 5)
    return [low + step * i for i in range(int((high - low) / step + 1e-9) + 1)]


def centres(columns: int) -> list[float]:
    """Per cent across of the middles of so many equal columns."""
    return [round(100 * (i + 0.5) / columns, 3) for i in range(columns)]


def column_ticks(labels: list[str], most: int = 6) -> list[Tick]:
    """Labels under every column, every 2nd, 5th, 10th and so on, so that there are at most so many."""
    step = next(m * 10**p for p in count() for m in (1, 2, 5) if len(labels) <= most * m * 10**p)
    return [Tick(at, label) for at, label in list(zip(centres(len(labels)), labels, strict=True))[::step]]


def number(value: float) -> str:
    """Three digits, as short as they can be."""
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e6 else text.replace("e-0", "e-").replace("e+0", "e")
