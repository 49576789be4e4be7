"""`squawq demo`: the main job on the demo model."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(out: Annotated[Path, typer.Option(help="Where the quantized demo model goes")] = Path("squawq-demo")) -> None:
    """Quantize the demo model, evaluate it, and generate a story with the 16-bit and the INT4 model.

    The model is a package of its own: pip install 'squawq[demo]'.

    \b
    Examples:
      squawq demo
    """
    from squawq.demo import run
    from squawq.progress import output

    stdout = output()
    stdout.width = min(stdout.width, 160)  # the stories stand side by side
    run(out, stdout)
    squawq = "squawq" if shutil.which("squawq") else sys.argv[0]  # as it was called, where it is not on the PATH
    stdout.print(f"The quantized model is in {out}. Talk to it:  {squawq} chat {out}")
    stdout.print(f"It is a plain AWQ checkpoint; a server that reads those serves it:  vllm serve {out}")
