"""Which drawings a report has: takes squawq_report.json's values, gives sections of charts. Knows no HTML.

Experts of one kind share a row, so that a layer of hundreds stays readable; the table and the JSON have each of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from squawq.report.charts import (
    Chart,
    Map,
    Values,
    amounts,
    heat_map,
    lines,
    paint_ratio,
    paint_share,
    ranges,
)
from squawq.report.scales import number

Record = Mapping[str, Any]
Layers = Sequence[Record]
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


def sections(report: Record) -> list[Section]:
    """Every section, in order; those without data say so."""
    layers = report["layers"]
    columns = [column(record) for record in layers]
    return [
        _layer_loss(layers, columns),
        _linear_loss(layers, columns),
        _scales(layers, columns),
        _clipping(layers, columns),
        _divergence(report.get("evaluation") or {}),
        _cost(layers, columns),
    ]


def column(record: Record) -> str:
    """A layer's number; its whole name where it has none."""
    return str(record["name"]).rpartition(".")[2]


def _layer_loss(layers: Layers, columns: list[str]) -> Section:
    rounded, kept = ([record[key] for record in layers] for key in ("loss_rounded", "loss"))
    if all(value is None for value in (*rounded, *kept)):
        return Section("layers", "Loss of each layer", "Plain rounding runs nothing, so no loss was measured.", [])
    series: dict[tuple[str, str], Values] = {("rounded to nearest", "before"): rounded, ("as kept", "after"): kept}
    text = "Mean squared error of the layer's output on calibration text, on a logarithmic axis; lower is better."
    return Section("layers", "Loss of each layer", text, [lines("Output error", "layer", columns, series, log=True)])


def _linear_loss(layers: Layers, columns: list[str]) -> Section:
    rows = by_linear(layers, loss_ratio)
    if not rows:
        return Section("linears", "Loss of each linear", "No linear's own loss was measured.", [])
    text = (
        "Error of each linear's own output, as a share of plain rounding's. A linear may lose a little where the layer "
        "as a whole gains."
    )
    drawing = heat_map(
        "Error against plain rounding",
        "layer",
        columns,
        rows,
        paint_ratio,
        RATIOS,
        lambda ratio: f"{number(ratio)} of plain rounding's error",
    )
    return Section("linears", "Loss of each linear", text, [drawing])


def _scales(layers: Layers, columns: list[str]) -> Section:
    groups = dict.fromkeys(_kind(row["linears"]) for record in layers for row in record["scales"])
    charts: list[Chart | Map] = []
    for kind in groups:
        bars = [_joined([row for row in record["scales"] if _kind(row["linears"]) == kind]) for record in layers]
        if any(bars):
            charts.append(ranges(kind, "layer", columns, bars))
    if not charts:
        return Section("scales", "Chosen scales", "No scales were chosen, or this report has no record of them.", [])
    text = (
        "What the input channels of linears that share an input were multiplied by before rounding. Thin bars go from "
        "the least to the greatest channel, thick ones hold 90% of them, the mark is the median. 1 changes nothing."
    )
    return Section("scales", "Chosen scales", text, charts)


def formula(row: Record) -> str:
    """A group's scales as a formula of mean activation x and mean weight w."""
    name, ratio = str(row["formula"]), number(row["ratio"])
    return {"identity": "no scales", "x": f"x^{ratio}", "xw": f"x^{ratio} / w^(1 − {ratio})"}.get(name, name)


def _kind(linears: Sequence[str]) -> str:
    """q_proj, k_proj, v_proj; an expert's linears as every expert's."""
    return ", ".join(dict.fromkeys(("experts' " if EXPERT.search(n) else "") + n.rpartition(".")[2] for n in linears))


def _joined(groups: Layers) -> tuple[list[float], str] | None:
    """Quantiles and formula of one group, or of the experts' groups together: the whole span, means inside it."""
    if not groups or not _all(groups, "quantiles"):
        return None
    least, low, middle, high, most = zip(*(row["quantiles"] for row in groups), strict=True)
    formulas = dict.fromkeys(map(formula, groups))
    words = next(iter(formulas)) if len(formulas) == 1 else f"{len(groups)} groups, {len(formulas)} formulas"
    return [min(least), mean(low), mean(middle), mean(high), max(most)], words


def _clipping(layers: Layers, columns: list[str]) -> Section:
    rows = by_linear(layers, lambda found: mean(row["clip"][2] for row in found) if _all(found, "clip") else None)
    if not rows:
        return Section("clipping", "Clip ratios", "No range was narrowed, or this report has no record of it.", [])
    text = (
        "How much of a group's range of weights is kept, in the median group: what lies outside is clamped, and what "
        "lies inside gets finer steps. Linears without a row are never clipped."
    )
    drawing = heat_map(
        "Range kept", "layer", columns, rows, paint_share, SHARES, lambda share: f"{share:.0%} of the range kept"
    )
    return Section("clipping", "Clip ratios", text, [drawing])


def _divergence(evaluation: Record) -> Section:
    kl = evaluation.get("kl_by_position") or []
    heading = "KL along the window"
    if not kl:
        text = "Not measured yet. Run squawq eval OUT --reference MODEL: it measures it and adds it here."
        return Section("divergence", heading, text, [])
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
    return Section("divergence", heading, text, [chart])


def _cost(layers: Layers, columns: list[str]) -> Section:
    heading = "Time and memory"
    seconds, peaks = ([record.get(key) for record in layers] for key in ("seconds", "peak_bytes"))
    if all(value is None for value in seconds):
        return Section("cost", heading, "This report has no record of them.", [])
    charts: list[Chart | Map] = [amounts("Seconds", "layer", columns, seconds, " s")]
    series = {("process", "after"): _gibibytes(peaks)}
    device = [record.get("device_peak_bytes") for record in layers]
    if any(value is not None for value in device):
        series["device", "before"] = _gibibytes(device)
    if any(value is not None for values in series.values() for value in values):
        charts.append(lines("Peak memory (GiB)", "layer", columns, series))
    text = (
        "Seconds for each layer, and the most memory that the process had held by then, libraries and all. A flat line "
        "says that memory does not grow with the number of layers."
    )
    return Section("cost", heading, text, charts)


def _gibibytes(values: Values) -> list[float | None]:
    return [None if value is None else value / 2**30 for value in values]


def _all(rows: Layers, *keys: str) -> bool:
    return all(row.get(key) is not None for row in rows for key in keys)


def loss_ratio(rows: Layers) -> float | None:
    """Summed loss of linears by plain rounding's; None where that is not known or 0."""
    if not _all(rows, "loss", "loss_rounded"):
        return None
    before = sum(row["loss_rounded"] for row in rows)
    return sum(row["loss"] for row in rows) / before if before > 0 else None


def by_linear(layers: Layers, value: Any) -> dict[str, list[float | None]]:
    """`value` of each layer's linears of one name (or expert), in a row a name; rows without any value are left out."""
    found: dict[str, dict[int, list[Record]]] = {}
    for index, record in enumerate(layers):
        for row in record["linears"]:
            name = EXPERT.sub("experts.*.", str(row["name"]))
            found.setdefault(name, {}).setdefault(index, []).append(row)
    rows = {name: [value(own[i]) if i in own else None for i in range(len(layers))] for name, own in found.items()}
    return {name: values for name, values in rows.items() if any(v is not None for v in values)}
