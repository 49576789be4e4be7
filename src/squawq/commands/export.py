"""`squawq export`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from squawq.progress import console, counting
from squawq.serve.flags import complete_model

Formats = Literal["awq", "gptq", "compressed-tensors", "gguf", "dense"]  # export.run.FORMATS, without importing torch


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A 4-bit folder (AWQ, GPTQ, AutoRound, compressed-tensors), or a Hub id",
            autocompletion=complete_model,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder (GGUF: file) to create; it appears when the work is done")
    ],
    format: Annotated[  # noqa: A002 (the flag's name)
        Formats, typer.Option(help="awq, gptq, compressed-tensors (vLLM), gguf (llama.cpp) or dense (16-bit weights)")
    ],
) -> None:
    """Convert a quantized model to another format without quantizing again, one layer in memory at a time.

    \b
    Examples:
      squawq export Llama-3.1-8B-AWQ Llama-3.1-8B-W4A16 --format compressed-tensors
      squawq export Llama-3.1-8B-GPTQ Llama-3.1-8B-AWQ --format awq
      squawq export Llama-3.1-8B-AWQ llama-3.1-8b.gguf --format gguf
    """
    from squawq.export.run import export as run

    with counting("exporting") as progress:
        report = run(model, out, format, progress=progress)
    console.print(f"{report['bytes'] / 1e6:,.1f} MB in {out}")
    print(out)
