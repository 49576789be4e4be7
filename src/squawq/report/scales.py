"""Axes of the report's charts: positions, ticks and labels as plain numbers.

Across, places are per cent of the drawing's width, so that a drawing fits any screen; down, they are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

HEIGHT = 200  # pixels of a chart's inside
MARGIN = 8  # pixels left free above and below the values


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
