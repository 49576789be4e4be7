"""The report's sentences: facts, summary, verdict, and the rows of its table. Knows no HTML."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from statistics import median

from squawq.quant_config import QuantConfig
from squawq.report.charts import number
from squawq.report.drawings import column, loss_ratio
from squawq.report.schema import Evaluation, LayerRow, ReadBackRow, Report, TuningRow

METHODS = {
    "squawq": "squawq: AWQ scales, QEP correction, rounding with error feedback (GPTQ)",
    "awq": "awq: AWQ scales and clipping, as published",
    "rtn": "rtn: round to nearest",
}
VERDICTS = ((0.01, "hardly any difference"), (0.05, "small"), (0.2, "noticeable"), (float("inf"), "large"))  # of KL


def verdict(kl: float) -> str:
    """A mean KL to the 16-bit model (nats) in words; docs/explanation/evaluation.md has the reasons."""
    return f"KL {number(kl)}: {next(words for limit, words in VERDICTS if kl < limit or limit == float('inf'))}"


def limits() -> str:
    """The mean KL (nats) up to which each of VERDICTS holds."""
    *bounded, (_, last) = VERDICTS
    return f"{', '.join(f'{words} below {limit}' for limit, words in bounded)}, otherwise {last}"


def headline(report: Report, name: str) -> list[str]:
    """What to know first: how good the result in the folder `name` is, and what to do next."""
    scores, model, out = report.evaluation, shlex.quote(report.model or "MODEL"), shlex.quote(name)
    if scores is None or scores.kl_mean is None:
        return [_compared(report), f"Next: squawq eval {out} --reference {model}"]
    said = [f"{verdict(scores.kl_mean)}, top-1 agreement {scores.top1_agreement or 0:.1%}."]
    if scores.kl_mean >= VERDICTS[-2][0]:
        said.append("Next: a smaller --group-size, or calibration text of the kind that the model is used for.")
    elif "squawq" in report.runs_in:
        said.append(f'Next: squawq generate {out} -p "Once upon a time", or squawq serve {out}')
    else:
        said.append(f"Next: load {name} in transformers, after import squawq.transformers")
    return said


def _compared(report: Report) -> str:
    """How far the result is from the 16-bit model as far as that is known without an evaluation."""
    if report.read_back is not None:
        return read_back(report.read_back)
    errors = [record.relative_error for record in report.layers if record.relative_error is not None]
    off = f"; the last layer's output is off by {errors[-1]:.2%} on calibration text" if errors else ""
    return f"Not compared with the 16-bit model yet{off}."


def read_back(row: ReadBackRow) -> str:
    """What comparing the finished folder with the 16-bit model has shown."""
    return (
        f"The folder was read back and compared with the 16-bit model on {row.tokens:,} tokens ({row.text}): mean KL "
        f"{number(row.kl_mean)} nats, same greedy token at {row.top1_agreement:.1%} of positions."
    )


def tuned(row: TuningRow) -> str:
    """What tuning of the scales has gained."""
    if row.loss >= row.loss_before:
        return f"Tuning scales did not lower the KL on {row.held_back} rows held back; they stay as they were."
    return (
        f"Tuning scales lowered the mean KL on {row.held_back} rows held back from {number(row.loss_before)} to "
        f"{number(row.loss)} nats, in {row.seconds:,.0f} s."
    )


def command(report: Report, name: str) -> str:
    """The command line that makes this result in the folder `name`, without the ways to its folders."""
    config, default = report.job.config, QuantConfig()
    words = ["squawq quantize", shlex.quote(report.model or "MODEL"), shlex.quote(name)]
    if report.calibration:
        words += ["--calibration", shlex.quote(report.calibration)]
    values: dict[str, object] = {"samples": None, "seqlen": 512, "group_size": default.group_size}
    values |= {"method": default.method, "seed": default.seed, "for_tensor_parallel": None}
    if config.method == "squawq":
        values |= {"refine": default.refine, "damping": default.damping}
    given = {key: value for key, value in config.to_dict().items() if value is not None}
    words += [f"{_flag(key)} {given[key]}" for key, plain in values.items() if given.get(key, plain) != plain]
    words += ["--symmetric"] if not config.zero_point else []
    switches = ("clip", "compensate", "act_order", "sequential") if config.method == "squawq" else ("clip",)
    words += [f"--no{_flag(key)[1:]}" for key in switches if not given.get(key, True)]
    words += [f"--skip {shlex.quote(name)}" for name in config.modules_to_not_convert]
    by_default = (report.stored_dtype or {}).get("by_default")  # unknown in earlier reports
    words += [f"--dtype {config.dtype}"] if config.dtype and config.dtype != by_default else []
    on_gpu = report.job.device == "cuda" and config.method == "squawq"
    weighted = config.token_weights if config.sequential is not False else None  # else there are none
    for key, chosen in (("token_weights", weighted), ("tune", config.tune)):
        if chosen is not None and chosen != on_gpu:
            words += [_flag(key) if chosen else f"--no{_flag(key)[1:]}"]
    words += [f"--device {report.job.device}"] if report.job.device != "cpu" else []
    return " ".join(words)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def sizes(report: Report) -> str:
    """Where the bytes are: what became 4-bit integers, and what stays in 16 bits."""
    weights, quantized = _quantized(report)
    text = f"{size(report.source_bytes)} → {size(report.bytes)}"
    if not weights:
        return text
    rest, embedding = report.bytes - quantized, report.embedding_bytes
    inside = f", the embedding is {size(embedding)} of them" if embedding else ""
    return f"{text}: {size(round(quantized))} of 4-bit linears, {size(round(rest))} stay in 16 bits{inside}"


def facts(report: Report, name: str) -> list[tuple[str, str]]:
    """Names and values at the head."""
    config, job = report.job.config, report.job
    group = "a whole row" if config.group_size == -1 else f"{config.group_size:,}"
    tokens = report.calibration_tokens
    found = [
        *([("date", report.date)] if report.date else []),
        *([("16-bit model", report.model)] if report.model else []),
        ("command", command(report, name)),
        ("method", METHODS.get(report.method, report.method)),
        ("weights", f"{config.bits} bits, groups of {group}, {'zero point' if config.zero_point else 'symmetric'}"),
        ("bits a weight", _bits(report)),
        ("size", sizes(report)),
        ("calibration", _calibration(report) if tokens else "none"),
        ("made by", f"squawq {report.squawq} on {job.device}"),
    ]
    seconds = [record.seconds for record in report.layers if record.seconds is not None]
    peaks = [record.peak_bytes for record in report.layers if record.peak_bytes is not None]
    if seconds:
        found.append(("time in layers", f"{sum(seconds):,.0f} s"))
    if peaks:
        found.append(("peak memory", f"{max(peaks) / 2**30:.2f} GiB"))
    return found


def _calibration(report: Report) -> str:
    config = report.job.config
    text = f"{report.calibration_tokens:,} tokens in blocks of {config.seqlen or 0:,}"
    if report.calibration == "self":
        return f"{text}, generated by the 16-bit model (seed {config.seed})"
    if report.calibration == "self+builtin":
        return f"{text}, generated by the 16-bit model (seed {config.seed}) and from the built-in set"
    return text


def _bits(report: Report) -> str:
    """Of the 4-bit linears (integers, and a 16-bit scale and a 4-bit zero a group), and of the whole model."""
    weights, quantized = _quantized(report)
    text = f"{8 * quantized / weights:.2f} in quantized linears" if weights else "nothing quantized"
    if parameters := report.parameters:
        text += f", {8 * report.bytes / parameters:.2f} over the whole model"
    return text


def _quantized(report: Report) -> tuple[int, float]:
    """Weights of the 4-bit linears, and the bytes of their integers, scales and zeros."""
    size = report.job.config.group_size
    rows = [row for record in report.layers for row in record.linears if row.kept_in_16_bits is None]
    weights = sum(row.out_features * row.in_features for row in rows)
    groups = sum(row.out_features * row.in_features / (row.in_features if size == -1 else size) for row in rows)
    return weights, weights / 2 + 2.5 * groups


def size(count: int) -> str:
    """Bytes in MB or GB (10^9)."""
    return f"{count / 1e6:,.1f} MB" if count < 10**9 else f"{count / 1e9:,.2f} GB"


def summary(report: Report) -> list[str]:
    """Sentences: what was gained, where it is worst, what fell back, what stays in 16 bits, what an evaluation said."""
    layers, ratios = report.layers, _ratios(report)
    said = []
    if ratios:
        worst, record = max(ratios, key=lambda pair: pair[0])
        largest = max((record for _, record in ratios), key=lambda record: record.loss or 0)
        said += errors(report)
        off = largest.relative_error
        said.append(
            f"Least was gained in layer {column(record)} ({worst:.0%}); the largest error is layer {column(largest)}'s "
            f"({number(largest.loss or 0)}{'' if off is None else f', {off:.2%} of its output'})."
        )
        fell = [column(record) for record in layers if record.method == "rtn"]
        said.append(
            f"{_count(len(fell), 'layer')} fell back to plain rounding: {', '.join(fell)}."
            if fell
            else "No layer fell back to plain rounding."
        )
    else:
        said.append("Weights were rounded to nearest without calibration; no loss was measured.")
    kept = len(report.kept_in_16_bits)
    said.append(f"{_count(kept, 'linear')} stayed in 16 bits; listed below." if kept else "Every linear is quantized.")
    if report.tuning is not None:
        said.append(tuned(report.tuning))
    evaluated = _evaluated(report.evaluation)
    if report.read_back is not None and evaluated:  # else it is the headline
        said.append(read_back(report.read_back))
    return said + evaluated


def errors(report: Report) -> list[str]:
    """The median layer's error against plain rounding's; nothing where it was not measured."""
    ratios = [ratio for ratio, _ in _ratios(report)]
    if not ratios:
        return []
    half = median(ratios)
    return [f"The error of a layer's output on calibration text is {half:.0%} of plain rounding's in the median layer."]


def _ratios(report: Report) -> list[tuple[float, LayerRow]]:
    """Each layer whose error was measured, and the error as a share of plain rounding's."""
    judged = [(loss_ratio([record]), record) for record in report.layers]
    return [(ratio, record) for ratio, record in judged if ratio is not None]


def _evaluated(scores: Evaluation | None) -> list[str]:
    if scores is None or scores.kl_mean is None:
        return []
    return [
        f"Against the 16-bit model on {scores.tokens:,} tokens: mean KL {number(scores.kl_mean)} nats "
        f"(99th percentile {number(scores.kl_p99 or 0)}), perplexity {scores.reference_perplexity or 0:.4g} → "
        f"{scores.perplexity or 0:.4g}, top-1 agreement {scores.top1_agreement or 0:.1%}."
    ]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


HEADINGS = ("layer", "linear", "shape", "rounded", "kept", "ratio", "range kept")


def table(report: Report) -> list[Sequence[tuple[str, float | None]]]:
    """A row for each linear: texts by HEADINGS, and the numbers to sort by (None: by the text)."""
    rows: list[Sequence[tuple[str, float | None]]] = []
    for index, record in enumerate(report.layers):
        for row in record.linears:
            before, after, ratio, clip = row.loss_rounded, row.loss, loss_ratio([row]), row.clip
            shape = row.out_features, row.in_features
            kept = "16 bits" if row.kept_in_16_bits is not None else "–"
            rows.append(
                (
                    (column(record), float(index)),
                    (row.name, None),
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
