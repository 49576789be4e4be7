"""Draws the pictures of docs/explanation/algorithm.md and inference.md as SVG. Needs matplotlib.

python tools/docs_pictures.py docs/pictures
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

TEAL, ORANGE, GREY, PALE = "#00796b", "#d9541e", "#9aa0a6", "#e3efed"
COLOURS = ("#00796b", "#d9541e", "#3f6fb5", "#8a63a8", "#b08a00")
mpl.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "squawq",
        "font.family": "sans-serif",
        "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def quantize(weights: Any, low: float, high: float) -> tuple[Any, float, int]:
    """Weights rounded to 16 levels between low and high: values, scale, zero point."""
    scale = (high - low) / 15
    zero = round(-low / scale)
    return (np.clip(np.round(weights / scale) + zero, 0, 15) - zero) * scale, scale, zero


def group() -> Any:
    return np.random.default_rng(4).normal(0.1, 0.45, 24)


def rounding() -> Figure:
    """One group on a number line: 16 levels, scale, zero point."""
    weights = group()
    stored, scale, zero = quantize(weights, weights.min(), weights.max())
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    axes = figure.subplots()
    levels = (np.arange(16) - zero) * scale
    axes.vlines(levels, 0, 1, color=GREY, linewidth=1)
    for integer, level in enumerate(levels):
        axes.text(level, -0.12, str(integer), ha="center", va="top", color=ORANGE if integer == zero else "black")
    axes.plot(weights, np.full_like(weights, 0.75), "o", color=TEAL, markersize=5)
    axes.plot(stored, np.full_like(weights, 0.25), "s", color=ORANGE, markersize=5)
    axes.plot([weights, stored], [0.75, 0.25], color=GREY, linewidth=0.7)
    axes.text(levels[0] - scale * 1.1, 0.75, "weights", ha="right", va="center", color=TEAL)
    axes.text(levels[0] - scale * 1.1, 0.25, "rounded", ha="right", va="center", color=ORANGE)
    axes.text(levels[0] - scale * 1.1, -0.12, "integers", ha="right", va="top")
    axes.annotate("", (levels[2], 1.12), (levels[1], 1.12), arrowprops={"arrowstyle": "<->"})
    axes.text((levels[1] + levels[2]) / 2, 1.2, "scale", ha="center")
    axes.text(levels[zero], 1.2, f"zero point {zero}: stores 0 exactly", ha="center", color=ORANGE)
    axes.set(ylim=(-0.4, 1.5), xlim=(levels[0] - scale * 3.5, levels[-1] + scale))
    axes.axis("off")
    return figure


def scales() -> Figure:
    """The error of a linear with an outlier channel by the exponent of AWQ's scales."""
    generator = np.random.default_rng(0)
    weight, inputs = generator.normal(0, 1, (64, 128)), generator.normal(0, 1, (512, 128))
    inputs[:, [7, 40, 90]] *= 25
    mean = np.abs(inputs).mean(0)
    grid = np.linspace(0, 1, 21)

    def error(ratio: float) -> float:
        scale = mean**ratio
        scaled = weight * scale
        low, high = scaled.min(1, keepdims=True), scaled.max(1, keepdims=True)
        step = (high - low) / 15
        rounded = (np.round((scaled - low) / step) * step + low) / scale
        return float((((rounded - weight) @ inputs.T) ** 2).mean())

    figure = Figure(figsize=(7.6, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(128), mean, color=[ORANGE if value > 5 else TEAL for value in mean], width=1)
    left.set(xlabel="input channel", ylabel="mean |x|", title="Three channels have large activations")
    errors = np.array([error(ratio) for ratio in grid])
    right.plot(grid, errors / errors[0], color=TEAL, marker="o", markersize=3)
    best = int(errors.argmin())
    right.plot(grid[best], errors[best] / errors[0], "o", color=ORANGE)
    right.annotate(f"r = {grid[best]:g}", (grid[best], errors[best] / errors[0]), (grid[best] - 0.08, 0.75))
    right.set(
        xlabel="r in s = mean|x|^r", ylabel="output error, r = 0 is 1", title="Output error after rounding", ylim=0
    )
    return figure


def clipping() -> Figure:
    """Squared error of a group by the share of its range that is kept."""
    weights = np.append(np.random.default_rng(8).normal(0, 0.3, 126), [-1.25, 1.1])
    shares = np.linspace(0.4, 1, 25)
    errors, parts = [], []
    for share in shares:
        stored, _, _ = quantize(weights, weights.min() * share, weights.max() * share)
        lost = (stored - weights) ** 2
        outside = (weights < weights.min() * share) | (weights > weights.max() * share)
        errors.append(lost.sum())
        parts.append((lost[outside].sum(), lost[~outside].sum()))
    clipped, rounded = zip(*parts, strict=True)
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(shares, rounded, clipped, colors=[PALE, "#f6d5c8"], labels=["rounding error", "clipping error"])
    axes.plot(shares, errors, color=TEAL, label="sum")
    best = int(np.argmin(errors))
    axes.plot(shares[best], errors[best], "o", color=ORANGE)
    axes.annotate("best range", (shares[best], errors[best]), (shares[best] - 0.02, errors[best] * 1.5), color=ORANGE)
    axes.set(xlabel="share of the range that is kept", ylabel="squared error", xlim=(0.4, 1))
    axes.legend(frameon=False)
    return figure


def feedback() -> Figure:
    """Rounding with and without error feedback on correlated inputs."""
    generator = np.random.default_rng(3)
    size = 24
    common = generator.normal(0, 1, (2000, 3)) @ generator.normal(0, 1, (3, size))
    inputs = common + 0.35 * generator.normal(0, 1, (2000, size))
    hessian = inputs.T @ inputs / len(inputs)
    hessian += 0.05 * np.diag(np.diag(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    plain, moved = (np.zeros(size), np.zeros(size))
    weights = generator.normal(0, 1, (200, size))
    step = 0.4
    nearest = np.round(weights / step) * step
    work, found = weights.copy(), np.zeros_like(weights)
    for column in range(size):
        found[:, column] = np.round(work[:, column] / step) * step
        error = (work[:, column] - found[:, column]) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
    for column in range(size):
        seen = slice(0, column + 1)
        plain[column] = (((nearest - weights)[:, seen] @ inputs[:500, seen].T) ** 2).mean()
        moved[column] = (((found - weights)[:, seen] @ inputs[:500, seen].T) ** 2).mean()
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, size + 1), plain, color=GREY, label="round to nearest")
    axes.plot(range(1, size + 1), moved, color=TEAL, label="with error feedback")
    axes.set(xlabel="columns rounded so far", ylabel="output error of these columns", xlim=(1, size), ylim=0)
    axes.legend(frameon=False)
    return figure


def boxes(axes: Any, texts: Sequence[str], x: float, y: float, colours: Sequence[str], width: float = 1) -> None:
    """A row of boxes with texts."""
    for index, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        left = x + index * width
        axes.add_patch(mpl.patches.Rectangle((left, y), width, 0.8, facecolor=colour, edgecolor="white", linewidth=1.5))
        dark = colour not in (PALE, "#f1f1f1", "#ffffff")
        axes.text(left + width / 2, y + 0.4, text, ha="center", va="center", color="white" if dark else "black")


def canvas(width: float, height: float, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def packing() -> Figure:
    """Which output channel is in which nibble of an AWQ GEMM word."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    figure, axes = canvas(11, 4.3, (7.6, 2.9))
    axes.text(2.4, 3.55, "output channel", ha="right", va="center")
    boxes(axes, [str(n) for n in range(8)], 2.6, 3.1, [COLOURS[0] if n % 2 == 0 else COLOURS[1] for n in range(8)])
    axes.text(2.4, 0.95, "one int32 word", ha="right", va="center")
    boxes(axes, [str(n) for n in order], 2.6, 0.6, [COLOURS[0] if n % 2 == 0 else COLOURS[1] for n in order])
    for nibble, channel in enumerate(order):
        axes.plot([3.1 + channel, 3.1 + nibble], [3.05, 1.45], color=GREY, linewidth=1)
        axes.text(3.1 + nibble, 0.3, f"{4 * nibble}-{4 * nibble + 3}", ha="center", va="center", fontsize=8)
    axes.text(2.4, 0.3, "bits", ha="right", va="center", fontsize=8)
    return figure


def pages() -> Figure:
    """Two sequences that share a prefix, their block tables and the pages."""
    figure, axes = canvas(13, 5.6, (7.6, 3.3))
    shared, a, b, free = COLOURS[0], COLOURS[2], COLOURS[1], "#f1f1f1"
    axes.text(0.1, 5.2, "block tables (page numbers, 16 tokens each)", va="center")
    axes.text(2.2, 4.2, "sequence A", ha="right", va="center")
    boxes(axes, ["3", "0", "5"], 2.4, 3.8, [shared, shared, a])
    axes.text(2.2, 3.1, "sequence B", ha="right", va="center")
    boxes(axes, ["3", "0", "6", "1"], 2.4, 2.7, [shared, shared, b, b])
    axes.text(2.2, 1.4, "KV cache", ha="right", va="center")
    owners = [shared, b, free, shared, free, a, b, free, free]
    boxes(axes, [str(n) for n in range(9)], 2.4, 1.0, owners)
    axes.text(2.4, 0.5, "pages 3 and 0 hold the common prompt once", color=shared, va="center")
    axes.text(8.4, 0.5, "free pages", color="#555555", va="center")
    return figure


def batching() -> Figure:
    """Slots of a batch over the steps, static and continuous."""
    figure, axes = canvas(16, 9.4, (7.6, 4.4))
    idle = "#f1f1f1"
    lengths = {"A": 3, "B": 7, "C": 4, "D": 5, "E": 2}
    colour = dict(zip(lengths, COLOURS, strict=True))
    static = [
        "AAA    DDDDD",
        "BBBBBBBEE   ",
        "CCCC        ",
    ]
    continuous = [
        "AAADDDDD    ",
        "BBBBBBB     ",
        "CCCCEE      ",
    ]
    for title, rows, top in (("static batching", static, 8.9), ("continuous batching", continuous, 4.3)):
        axes.text(0.1, top, title, va="center", weight="bold")
        for slot, row in enumerate(rows):
            y = top - 1.3 - slot
            axes.text(2.0, y + 0.4, f"slot {slot}", ha="right", va="center")
            cells = [cell.strip() for cell in row]
            boxes(axes, cells, 2.2, y, [colour.get(cell, idle) for cell in cells])
    axes.text(2.2, 0.3, "steps, from left to right; a letter is one token of a request", va="center", fontsize=9)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "rounding": rounding,
    "scales": scales,
    "clipping": clipping,
    "error-feedback": feedback,
    "packing": packing,
    "pages": pages,
    "batching": batching,
}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
