"""Turns a report into sections of charts. Knows no HTML.

Experts of one kind share a row, so that a layer of hundreds stays readable; the table and the JSON have each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from squawq.report.charts import Chart, Map, Values, amounts, heat_map, lines, number, paint_ratio, paint_share, ranges
from squawq.report.schema import Evaluation, LayerRow, LinearRow, Report, ScaleRow

Layers = Sequence[LayerRow]
EXPERT = re.compile(r"\bexperts\.\d+\.")
POSITIONS = 128  # points of the line over positions
RATIOS = [(2**-3, "⅛"), (2**-2, "¼"), (2**-1, "½"), (1, "as rounded"), (2, "2×"), (4, "4×")]
SHARES = [(1, "all"), (0.9, "90%"), (0.8, "80%"), (0.7, "70%"), (0.6, "60%"), (0.5, "half")]


@dataclass(frozen=True)
class Section:
    """A heading, what the drawings show, and the drawings; without any, `text` says why."""

    name: str
    heading: str
    text: str
    charts: list[Chart | Map]


Drawn = tuple[str, list[Chart | Map]]  # a section's text and charts


def sections(report: Report) -> list[Section]:
    """Every section, in order; those without data say so."""
    layers = report.layers
    columns = [column(record) for record in layers]
    return [
        Section("layers", "Loss of each layer", *_layer_loss(layers, columns)),
        Section("linears", "Loss of each linear", *_linear_loss(layers, columns)),
        Section("scales", "Chosen scales", *_scales(layers, columns)),
        Section("clipping", "Clip ratios", *_clipping(layers, columns)),
        Section("divergence", "KL along the window", *_divergence(report.evaluation)),
        Section("cost", "Time and memory", *_cost(layers, columns)),
    ]


def column(record: LayerRow) -> str:
    """A layer's number; its whole name where it has none."""
    return record.name.rpartition(".")[2]


def _layer_loss(layers: Layers, columns: list[str]) -> Drawn:
    rounded, kept = [record.loss_rounded for record in layers], [record.loss for record in layers]
    if all(value is None for value in (*rounded, *kept)):
        return "Plain rounding runs nothing, so no loss was measured.", []
    series: dict[tuple[str, str], Values] = {("rounded to nearest", "before"): rounded, ("as kept", "after"): kept}
    text = "Mean squared error of the layer's output on calibration text, on a logarithmic axis; lower is better."
    return text, [lines("Output error", "layer", columns, series, log=True)]


def _linear_loss(layers: Layers, columns: list[str]) -> Drawn:
    rows = by_linear(layers, loss_ratio)
    if not rows:
        return "No linear's own loss was measured.", []
    text = (
        "Error of each linear's own output, as a share of plain rounding's. A linear may lose a little where the layer "
        "as a whole gains."
    )

    def words(ratio: float) -> str:
        return f"{number(ratio)} of plain rounding's error"

    return text, [heat_map("Error against plain rounding", "layer", columns, rows, paint_ratio, RATIOS, words)]


def _scales(layers: Layers, columns: list[str]) -> Drawn:
    groups = dict.fromkeys(_kind(row.linears) for record in layers for row in record.scales)
    charts: list[Chart | Map] = []
    for kind in groups:
        bars = [_joined([row for row in record.scales if _kind(row.linears) == kind]) for record in layers]
        if any(bars):
            charts.append(ranges(kind, "layer", columns, bars))
    if not charts:
        return "No scales were chosen, or this report has no record of them.", []
    text = (
        "What the input channels of linears that share an input were multiplied by before rounding. Thin bars go from "
        "the least to the greatest channel, thick ones hold 90% of them, the mark is the median. 1 changes nothing."
    )
    return text, charts


def formula(row: ScaleRow) -> str:
    """A group's scales as a formula of mean activation x and mean weight w."""
    name, ratio = row.formula, number(row.ratio)
    return {"identity": "no scales", "x": f"x^{ratio}", "xw": f"x^{ratio} / w^(1 − {ratio})"}.get(name, name)


def _kind(linears: Sequence[str]) -> str:
    """q_proj, k_proj, v_proj; an expert's linears as every expert's."""
    return ", ".join(dict.fromkeys(("experts' " if EXPERT.search(n) else "") + n.rpartition(".")[2] for n in linears))


def _joined(groups: Sequence[ScaleRow]) -> tuple[list[float], str] | None:
    """Quantiles and formula of one group, or of the experts' groups together: the whole span, means inside it."""
    quantiles = [row.quantiles for row in groups if row.quantiles is not None]
    if not groups or len(quantiles) < len(groups):
        return None
    least, low, middle, high, most = zip(*quantiles, strict=True)
    formulas = dict.fromkeys(map(formula, groups))
    words = next(iter(formulas)) if len(formulas) == 1 else f"{len(groups)} groups, {len(formulas)} formulas"
    return [min(least), mean(low), mean(middle), mean(high), max(most)], words


def _clipping(layers: Layers, columns: list[str]) -> Drawn:
    rows = by_linear(layers, _kept_range)
    if not rows:
        return "No range was narrowed, or this report has no record of it.", []
    text = (
        "How much of a group's range of weights is kept, in the median group: what lies outside is clamped, and what "
        "lies inside gets finer steps. Linears without a row are never clipped."
    )
    words = "{:.0%} of the range kept".format
    return text, [heat_map("Range kept", "layer", columns, rows, paint_share, SHARES, words)]


def _kept_range(rows: Sequence[LinearRow]) -> float | None:
    """Mean over linears of the median share of their ranges that is kept."""
    clips = [row.clip for row in rows if row.clip is not None]
    return mean(clip[2] for clip in clips) if len(clips) == len(rows) else None


def _divergence(evaluation: Evaluation | None) -> Drawn:
    kl = [] if evaluation is None else evaluation.kl_by_position
    if not kl:
        return "Not measured yet. Run squawq eval OUT --reference MODEL: it measures it and adds it here.", []
    step = -(-len(kl) // POSITIONS)
    means = [mean(kl[start : start + step]) for start in range(0, len(kl), step)]
    chart = lines(
        "KL to the 16-bit model (nats)",
        "position",
        [f"{start:,}" for start in range(0, len(kl), step)],
        {("this model", "after"): means},
    )
    text = (
        "How far the next token's probabilities are from the 16-bit model's at each position of the window, in nats. "
        "A line that climbs says that errors add up along the context. Where windows overlap, the places before their "
        "new part come from the first window alone and vary more."
    )
    return text, [chart]


def _cost(layers: Layers, columns: list[str]) -> Drawn:
    seconds, peaks = [record.seconds for record in layers], [record.peak_bytes for record in layers]
    if all(value is None for value in seconds):
        return "This report has no record of them.", []
    charts: list[Chart | Map] = [amounts("Seconds", "layer", columns, seconds, " s")]
    series = {("process", "after"): _gibibytes(peaks)}
    device = [record.device_peak_bytes for record in layers]
    if any(value is not None for value in device):
        series["device", "before"] = _gibibytes(device)
    if any(value is not None for values in series.values() for value in values):
        charts.append(lines("Peak memory (GiB)", "layer", columns, series))
    text = (
        "Seconds for each layer, and the most memory that the process had held by then, libraries and all. A flat line "
        "says that memory does not grow with the number of layers."
    )
    return text, charts


def _gibibytes(values: Values) -> list[float | None]:
    return [None if value is None else value / 2**30 for value in values]


def loss_ratio(rows: Sequence[LayerRow] | Sequence[LinearRow]) -> float | None:
    """Summed loss by that of plain rounding; None where that is not known or 0."""
    losses = [(row.loss, row.loss_rounded) for row in rows if row.loss is not None and row.loss_rounded is not None]
    before = sum(rounded for _, rounded in losses)
    return sum(loss for loss, _ in losses) / before if len(losses) == len(rows) and before > 0 else None


def by_linear(layers: Layers, value: Callable[[Sequence[LinearRow]], float | None]) -> dict[str, list[float | None]]:
    """`value` of each layer's linears of one name (or expert), in a row a name; rows without any value are left out."""
    found: dict[str, dict[int, list[LinearRow]]] = {}
    for index, record in enumerate(layers):
        for row in record.linears:
            name = EXPERT.sub("experts.*.", row.name)
            found.setdefault(name, {}).setdefault(index, []).append(row)
    rows = {name: [value(own[i]) if i in own else None for i in range(len(layers))] for name, own in found.items()}
    return {name: values for name, values in rows.items() if any(v is not None for v in values)}
