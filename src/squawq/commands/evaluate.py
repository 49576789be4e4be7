"""`squawq eval`: figures as a table for people or JSON for machines, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from squawq.commands.options import Device, Model
from squawq.progress import PlainConsole, console, counting


def evaluate(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(help="The 16-bit model to compare with: KL and top-1 agreement")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; default: the built-in evaluation text")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of context; default: 1024, or the model's context")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: half a window")] = None,
    max_tokens: Annotated[int, typer.Option(help="Read at most so many tokens", min=2)] = 32_768,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of the table")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: loss per layer, KL per position")] = None,
    device: Device = "cpu",
) -> None:
    """Measure a model: perplexity, and with --reference how far it is from its 16-bit original (added to its report).

    Examples: squawq eval OUT --reference MODEL
    | squawq eval OUT --reference MODEL --text wiki.txt --window 2048 --json --plot loss.png
    """
    from squawq.evaluation.run import evaluate as run

    if plot is not None:
        from squawq.evaluation.plots import check_plot

        check_plot(plot)
    with counting("evaluating") as progress:
        scores = run(
            model,
            reference,
            text=text,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            device=device,
            progress=progress,
        )
    if plot is not None:
        from squawq.evaluation.plots import save_plot
        from squawq.format.files import has_file, read_json
        from squawq.hub.download import resolve
        from squawq.report.files import REPORT

        report = resolve(model) / REPORT
        save_plot(plot, read_json(report) if has_file(report) else None, scores)
        console.print(f"plot: {plot}")
    if as_json:
        print(json.dumps(allow_nan=False, obj={"model": model, "reference": reference, **scores}))
    else:
        _print_scores(scores)
    if reference is not None:
        _add_to_report(Path(model), reference, scores)


def _print_scores(scores: dict[str, Any]) -> None:
    table = Table(title=f"{scores['tokens']:,} tokens, window {scores['window']}, stride {scores['stride']}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("perplexity", f"{scores['perplexity']:.4f}")
    if "kl_mean" in scores:
        table.add_row("perplexity of the reference", f"{scores['reference_perplexity']:.4f}")
        table.add_row("KL to the reference, mean (nats)", f"{scores['kl_mean']:.5f}")
        table.add_row("KL to the reference, 99th percentile", f"{scores['kl_p99']:.5f}")
        table.add_row("same likeliest token", f"{scores['top1_agreement']:.2%}")
    PlainConsole().print(table)


def _add_to_report(folder: Path, reference: str, scores: dict[str, Any]) -> None:
    """Into the report beside the weights; not into a model that lies in the Hub's cache."""
    from squawq.report.files import PAGE, REPORT, add_evaluation

    if not (folder / REPORT).is_file():
        return
    try:
        add_evaluation(folder, reference, scores)
    except OSError as error:  # the figures are out already
        console.print(f"{folder} cannot be written ({error.strerror}); its report stays as it was")
    else:
        console.print(f"report: {folder / PAGE}")
