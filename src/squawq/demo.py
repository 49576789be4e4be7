"""`squawq demo`: the main job on the demo model, in front of the user."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from squawq.engine.request import SamplingParams
from squawq.errors import DependencyError
from squawq.evaluation.run import evaluate
from squawq.format.reader import Checkpoint
from squawq.llm import LLM
from squawq.progress import LayerProgress, counting
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize
from squawq.report.files import add_evaluation

QUESTION = "Tell me a story."
CALIBRATION_BLOCKS = 32
EVALUATED_TOKENS = 16_384


def demo_model() -> Path:
    """The folder of the 16-bit demo model, from the package squawq-demo.

    Raises:
        DependencyError: squawq-demo is not installed.
    """
    try:
        from squawq_demo import FOLDER
    except ModuleNotFoundError as error:
        raise DependencyError("the demo model is not installed: pip install 'squawq[demo]'") from error
    return FOLDER


def run(out: Path, console: Console) -> dict[str, Any]:
    """Quantize the demo model into `out`, measure both, let both answer; returns what was measured."""
    model = demo_model()
    console.print(f"1. Quantizing the demo model (7.3 M parameters, TinyStories) into {out}", style="bold")
    started = time.monotonic()
    with LayerProgress() as observer:
        quantize(model, out, QuantConfig(samples=CALIBRATION_BLOCKS), observer=observer)
    seconds = time.monotonic() - started  # next to nothing where the result was there already
    console.print("2. Measuring on stories that neither training nor calibration saw", style="bold")
    with counting("evaluating") as progress:
        scores = evaluate(out, model, text=model / "held_back.txt", max_tokens=EVALUATED_TOKENS, progress=progress)
    add_evaluation(out, model, scores)
    table = Table(title=f"quantized in {seconds:.0f} s, measured on {scores['tokens']:,} tokens")
    for heading in ("", "16-bit", "AWQ INT4"):
        table.add_column(heading, justify="right" if heading else "left")
    sizes = [Checkpoint(folder).nbytes() for folder in (model, out)]
    table.add_row("weights", *(f"{size / 1e6:.1f} MB" for size in sizes))
    table.add_row("perplexity", f"{scores['reference_perplexity']:.2f}", f"{scores['perplexity']:.2f}")
    table.add_row("KL to 16-bit, mean", "", f"{scores['kl_mean']:.4f} nats")
    table.add_row("top-1 agreement", "", f"{scores['top1_agreement']:.1%}")
    console.print(table, soft_wrap=False)
    console.print(f"3. Asking both: {QUESTION}", style="bold")
    answers = Table(show_lines=True)
    for heading, folder in (("16-bit", model), ("AWQ INT4", out)):
        answers.add_column(heading, ratio=1)
        scores[heading] = LLM(folder).chat([{"role": "user", "content": QUESTION}], SamplingParams(max_tokens=220))
    answers.add_row(scores["16-bit"], scores["AWQ INT4"])
    console.print(answers, soft_wrap=False)
    return scores
