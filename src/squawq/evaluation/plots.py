"""Plots the loss of every layer, by plain rounding and as quantized, and the KL along the window."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from squawq.errors import ConfigError, DependencyError, OutputError
from squawq.report.schema import Report


def check_plot(path: str | Path) -> None:
    """Raises DependencyError without matplotlib, ConfigError for a folder, a link, or a file in no folder."""
    if find_spec("matplotlib") is None:
        raise DependencyError("--plot needs the package matplotlib: pip install matplotlib")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"--plot {str(path)!r}: there is no such folder")
    if Path(path).is_dir():
        raise ConfigError(f"--plot {str(path)!r} is a folder; name a file in it, such as loss.png")
    if Path(path).is_symlink() and (Path(path).is_file() or not Path(path).exists()):
        raise ConfigError(f"--plot {str(path)!r}: is a link to {Path(path).readlink()}; name that file, or another")


def save_plot(path: str | Path, report: Mapping[str, Any] | None, scores: Mapping[str, Any]) -> None:
    """Write a PNG. `report` is squawq_report.json if the folder has one, `scores` the result of `evaluate`.

    Raises OutputError where it cannot be written, CheckpointError for a report that is none, ConfigError and
    DependencyError as `check_plot`.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = Report.read(report).layers if report and "layers" in report else []  # none in others' folders, exported
    layers = [row for row in rows if row.loss_rounded is not None]
    if layers:
        x = range(len(layers))
        left.plot(x, [row.loss_rounded for row in layers], "o--", color="tab:gray", label="rounded to nearest")
        left.plot(x, [row.loss for row in layers], "o-", color="tab:blue", label="as kept")
        up = "mean squared error of its output"
        left.set(yscale="log", xlabel="decoder layer", ylabel=up, title="Loss per layer")
        left.legend()
    else:
        left.text(0.5, 0.5, "no losses in squawq_report.json", ha="center", transform=left.transAxes)
    kl = scores.get("kl_by_position") or []
    if kl:
        step = max(1, len(kl) // 64)
        means = [sum(kl[i : i + step]) / len(kl[i : i + step]) for i in range(0, len(kl), step)]
        right.plot([i * step for i in range(len(means))], means, color="tab:orange")
        title = f"KL per position (mean {scores['kl_mean']:.4g} nats)"
        across, up = "position in the window (tokens)", "KL to the 16-bit model (nats)"
        right.set(xlabel=across, ylabel=up, title=title, ylim=(0, None))
    else:
        right.text(0.5, 0.5, "give --reference to see the KL", ha="center", transform=right.transAxes)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    try:
        Path(path).write_bytes(drawn.getvalue())
    except OSError as error:
        raise OutputError(f"the plot {path} cannot be written: {error.strerror}") from error
