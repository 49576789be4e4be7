"""Draws the main charts of a report as one SVG file, for README.md.

    squawq demo && python tools/report_picture.py squawq-demo docs/pictures/report.svg

FOLDER is a quantized folder that has been evaluated. The SVG uses the report's own styles, follows dark mode and has no
script.
"""

from __future__ import annotations

import sys
from html import escape
from importlib.resources import files
from pathlib import Path

from squawq.format.files import read_json
from squawq.report.charts import Chart, Map
from squawq.report.drawings import sections
from squawq.report.files import REPORT
from squawq.report.schema import Report
from squawq.report.words import headline, sizes

WIDTH, MARGIN, GAP = 960, 24, 36
SHOWN = ("layers", "linears", "divergence")


def text(x: float, y: float, words: str, style: str = "", anchor: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{anchor}" style="{style}">{escape(words)}</text>'


def draw(chart: Chart | Map, x: float, y: float, width: float) -> str:
    """One chart with its names and ticks; (x, y) is the upper left corner."""
    left, inner = x + chart.gutter, width - chart.gutter
    parts = [
        text(x, y - 10, f"{chart.title} by {chart.across}", "fill: var(--text); font-weight: 600; font-size: 13px")
    ]
    parts += [text(left - 6, y + tick.at + 4, tick.label, anchor="end") for tick in chart.y_ticks]
    parts.append(f'<svg x="{left:g}" y="{y:g}" width="{inner:g}" height="{chart.height + 18}">')
    parts.append(f'<rect class="frame" width="100%" height="{chart.height}"/>')
    parts += [
        f'<text class="middle" x="{tick.at}%" y="{chart.height + 14}">{escape(tick.label)}</text>'
        for tick in chart.x_ticks
    ]
    if isinstance(chart, Map):
        parts += [
            f'<rect class="{c.kind}" x="{c.x}%" y="{c.y}" width="{c.width}%" height="21" fill-opacity="{c.strength}"/>'
            for c in chart.cells
        ]
    else:
        parts += [f'<line class="grid" x2="100%" y1="{t.at}" y2="{t.at}"/>' for t in chart.y_ticks]
        parts.append(f'<svg width="100%" height="{chart.height}" viewBox="0 0 1000 {chart.height}"')
        parts.append(' preserveAspectRatio="none">')
        parts += [f'<path class="line {n.kind}" d="{n.path}" vector-effect="non-scaling-stroke"/>' for n in chart.lines]
        parts.append("</svg>")
    parts.append("</svg>")
    if isinstance(chart, Map):
        for index, sample in enumerate(chart.legend):
            place, under = x + index * width / len(chart.legend), y + chart.height + 28
            swatch = f'class="{sample.kind}" fill-opacity="{sample.strength}" width="14" height="10"'
            parts.append(f'<rect x="{place:g}" y="{under:g}" {swatch} stroke="var(--rule)"/>')
            parts.append(text(place, under + 24, sample.title))
    elif len(chart.lines) > 1:
        for index, line in enumerate(chart.lines):
            place = left + inner - 130 * (len(chart.lines) - index)
            parts.append(text(place, y - 10, f"● {line.label}", f"fill: var(--{line.kind})"))
    return "".join(parts)


def picture(folder: Path) -> str:
    """The SVG of a folder's squawq_report.json."""
    path = folder / REPORT
    report = Report.read(read_json(path), str(path))
    found = {section.name: section.charts[0] for section in sections(report) if section.charts}
    layers, linears, divergence = (found[name] for name in SHOWN)
    half = (WIDTH - 2 * MARGIN - GAP) / 2
    head = 112
    below = head + max(layers.height, linears.height) + 64
    height = below + divergence.height + 40
    style = files("squawq").joinpath("report/page.css").read_text(encoding="utf-8")
    box = f"0 0 {WIDTH} {height}"
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="{box}">',
            f"<title>Report of {escape(str(report.model))}</title><style>{style}</style>",
            f'<rect width="{WIDTH}" height="{height}" style="fill: var(--page)"/>',
            text(MARGIN, 36, str(report.model), "fill: var(--text); font-size: 20px; font-weight: 600"),
            text(MARGIN, 58, headline(report, folder.resolve().name)[0], "fill: var(--text); font-size: 13px"),
            text(MARGIN, 76, sizes(report), "font-size: 13px"),
            draw(layers, MARGIN, head, half),
            draw(linears, MARGIN + half + GAP, head, half),
            draw(divergence, MARGIN, below, WIDTH - 2 * MARGIN),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: report_picture.py FOLDER OUT.svg")
    Path(sys.argv[2]).write_text(picture(Path(sys.argv[1])), encoding="utf-8")
