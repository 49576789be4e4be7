"""`squawq eval`: figures as a table for people or JSON for machines, and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from squawq.commands.options import Device, Model
from squawq.commands.output import do_all, results
from squawq.errors import ConfigError, OutputError
from squawq.progress import console, counting, output
from squawq.report.words import limits, verdict

UNLIKE = 200  # perplexity; language models have 5 to 50 on text that they know


def evaluate(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(help="The 16-bit model to compare with: KL and top-1 agreement")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; default: the built-in evaluation text")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of context; default: 1024, or the model's context")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: half a window")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to read", min=2)] = 32_768,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of the table")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: loss per layer, KL per position")] = None,
    device: Device = "cpu",
) -> None:
    """Compute perplexity; with --reference also KL and top-1 agreement with the 16-bit model, added to the report.

    \b
    Examples:
      squawq eval OUT --reference MODEL
      squawq eval OUT --reference MODEL --text wiki.txt --window 2048 --json --plot loss.png
    """
    from squawq.evaluation.run import evaluate as run

    if reference is not None and _same(model, reference):
        raise ConfigError(
            f"--reference {reference!r} is the model itself, so that KL is 0; give the 16-bit model that it was made "
            "from, or leave --reference out for its perplexity alone"
        )
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

    def show() -> None:
        with results():
            if as_json:
                print(json.dumps(allow_nan=False, obj={"model": model, "reference": reference, **scores}))
            else:
                _print_scores(scores)

    steps: list[Callable[[], object]] = [show]  # first: they took long, and what follows may fail
    if reference is not None:
        steps.append(lambda: _add_to_report(Path(model), reference, scores))
    if plot is not None:
        steps.append(lambda: _draw(model, plot, scores))
    do_all(*steps)


def _draw(model: str, plot: Path, scores: dict[str, Any]) -> None:
    from squawq.evaluation.plots import save_plot
    from squawq.format.files import has_file, read_json
    from squawq.hub.download import resolve
    from squawq.report.files import REPORT

    report = resolve(model) / REPORT
    save_plot(plot, read_json(report) if has_file(report) else None, scores)
    console.print(f"plot: {plot}")


def _print_scores(scores: dict[str, Any]) -> None:
    console = output()
    console.print(
        f"{scores['tokens']:,} tokens of {scores['text']}, window {scores['window']}, stride {scores['stride']}"
    )
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("perplexity", f"{scores['perplexity']:.4f}")
    if "kl_mean" in scores:
        table.add_row("perplexity of the reference", f"{scores['reference_perplexity']:.4f}")
        table.add_row("KL to the reference, mean (nats)", f"{scores['kl_mean']:.5f}")
        table.add_row("KL to the reference, 99th percentile", f"{scores['kl_p99']:.5f}")
        table.add_row("top-1 agreement", f"{scores['top1_agreement']:.2%}")
    console.print(table, soft_wrap=False)
    if "kl_mean" in scores:
        console.print(f"{verdict(scores['kl_mean'])} ({limits()})")
    own = scores.get("reference_perplexity", scores["perplexity"])
    if own > UNLIKE:
        console.print(
            f"A perplexity of {own:,.0f} says that this text is unlike what the model was trained on; measure on text "
            "of the kind that it is used for: --text FILE"
        )


def _same(model: str, reference: str) -> bool:
    """Whether both are one folder, or one Hub id."""
    return model == reference or Path(model).resolve() == Path(reference).resolve()


def _add_to_report(folder: Path, reference: str, scores: dict[str, Any]) -> None:
    """Into the report beside the weights; not into a model that lies in the Hub's cache."""
    from squawq.report.files import PAGE, REPORT, add_evaluation

    if not (folder / REPORT).is_file():
        return
    try:
        add_evaluation(folder, reference, scores)
    except OutputError as error:  # the figures are out already
        console.print(f"the report stays as it was: {error}")
    else:
        console.print(f"report: {folder / PAGE}")
