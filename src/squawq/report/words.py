"""What the report says in words: the facts at its head, its summary, and the rows of its table. Knows no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from squawq.report.drawings import column, loss_ratio
from squawq.report.scales import number

Record = Mapping[str, Any]
METHODS = {
    "squawq": "squawq: AWQ's scales, rounding that sees the error",
    "awq": "awq: scales and ranges as published",
    "rtn": "rtn: rounding to nearest",
}


def facts(report: Record) -> list[tuple[str, str]]:
    """Names and values at the head."""
    config, job = report["job"]["config"], report["job"]
    group = "a whole row" if config["group_size"] == -1 else f"{config['group_size']:,}"
    tokens = report["calibration_tokens"]
    found = [
        ("method", METHODS.get(report["method"], str(report["method"]))),
        (
            "weights",
            f"{config['bits']} bits, groups of {group}, {'zero point' if config['zero_point'] else 'symmetric'}",
        ),
        ("bits a weight", _bits(report)),
        ("size", f"{_size(report['source_bytes'])} → {_size(report['bytes'])}"),
        ("calibration", f"{tokens:,} tokens in blocks of {config['seqlen']:,}" if tokens else "none"),
        ("made by", f"squawq {report['squawq']} on {job['device']}"),
    ]
    seconds = [record["seconds"] for record in report["layers"] if record.get("seconds") is not None]
    peaks = [record["peak_bytes"] for record in report["layers"] if record.get("peak_bytes") is not None]
    if seconds:
        found.append(("time in layers", f"{sum(seconds):,.0f} s"))
    if peaks:
        found.append(("peak memory", f"{max(peaks) / 2**30:.2f} GiB"))
    return found


def _bits(report: Record) -> str:
    """Of the 4-bit linears (integers, and a 16-bit scale and a 4-bit zero a group), and of the whole model."""
    size = report["job"]["config"]["group_size"]
    rows = [row for record in report["layers"] for row in record["linears"] if "kept_in_16_bits" not in row]
    weights = sum(row["out_features"] * row["in_features"] for row in rows)
    groups = sum(
        row["out_features"] * row["in_features"] / (row["in_features"] if size == -1 else size) for row in rows
    )
    text = f"{4 + 20 * groups / weights:.2f} in quantized linears" if weights else "nothing quantized"
    if parameters := report.get("parameters"):
        text += f", {8 * report['bytes'] / parameters:.2f} over the whole model"
    return text


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 10**9 else f"{count / 1e9:,.2f} GB"


def summary(report: Record) -> list[str]:
    """Sentences: what was gained, where it is worst, what fell back, what stays in 16 bits, what an evaluation said."""
    layers = report["layers"]
    judged = [(loss_ratio([record]), record) for record in layers]
    ratios = [(ratio, record) for ratio, record in judged if ratio is not None]
    said = []
    if ratios:
        half = median(ratio for ratio, _ in ratios)
        worst, record = max(ratios, key=lambda pair: pair[0])
        largest = max((record for _, record in ratios), key=lambda record: record["loss"])
        said.append(f"The error of a layer's output is {half:.0%} of plain rounding's in the median layer.")
        said.append(
            f"Least was gained in layer {column(record)} ({worst:.0%}); the largest error is layer {column(largest)}'s "
            f"({number(largest['loss'])})."
        )
        fell = [column(record) for record in layers if record["method"] == "rtn"]
        said.append(
            f"{_count(len(fell), 'layer')} fell back to plain rounding: {', '.join(fell)}."
            if fell
            else "No layer fell back to plain rounding."
        )
    else:
        said.append("Weights were rounded to nearest, without looking at text; no loss was measured.")
    kept = len(report["kept_in_16_bits"])
    said.append(f"{_count(kept, 'linear')} stayed in 16 bits; listed below." if kept else "Every linear is quantized.")
    return said + _evaluated(report.get("evaluation") or {})


def _evaluated(scores: Record) -> list[str]:
    if "kl_mean" not in scores:
        return []
    return [
        f"Against the 16-bit model on {scores['tokens']:,} tokens: mean KL {number(scores['kl_mean'])} nats "
        f"(99th percentile {number(scores['kl_p99'])}), perplexity {scores['reference_perplexity']:.4g} → "
        f"{scores['perplexity']:.4g}, the same likeliest token in {scores['top1_agreement']:.1%}."
    ]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


HEADINGS = ("layer", "linear", "shape", "rounded", "kept", "ratio", "range kept")


def table(report: Record) -> list[Sequence[tuple[str, float | None]]]:
    """A row for each linear: texts by HEADINGS, and the numbers to sort by (None: by the text)."""
    rows: list[Sequence[tuple[str, float | None]]] = []
    for index, record in enumerate(report["layers"]):
        for row in record["linears"]:
            before, after, ratio = row.get("loss_rounded"), row.get("loss"), loss_ratio([row])
            clip = row.get("clip")
            shape = row["out_features"], row["in_features"]
            kept = "16 bits" if "kept_in_16_bits" in row else "–"
            rows.append(
                (
                    (column(record), float(index)),
                    (str(row["name"]), None),
                    (f"{shape[0]:,} × {shape[1]:,}", float(shape[0] * shape[1])),
                    _cell(before, kept),
                    _cell(after, kept),
                    ("–", -1.0) if ratio is None else (f"{ratio:.0%}", ratio),
                    ("–", 2.0) if clip is None else (f"{clip[2]:.0%}", float(clip[2])),
                )
            )
    return rows


def _cell(value: float | None, absent: str) -> tuple[str, float]:
    return (absent, -1.0) if value is None else (number(value), value)
