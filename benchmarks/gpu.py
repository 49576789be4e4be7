"""Checks and measures the CUDA backend on an NVIDIA GPU, beside torch and other INT4 kernels, in one run.

    python -m benchmarks.gpu [--only products streams] [--json gpu.json] [--folder DIR] [--limit 460]
    python -m benchmarks.gpu --plot gpu.json        draws docs/pictures/gpu-roofline.svg; needs matplotlib, and no GPU
    python -m benchmarks.gpu --markdown gpu.json    prints the tables for docs/benchmarks.md

Parts run in the order of PARTS, and each prints its results as they come. A part that fails is reported, and one that
takes longer than its time is stopped at its next result; the others go on. The JSON is written after each part.
Products are timed as replays of CUDA graphs over weights that are together larger than any cache. Models have random
weights. Peers (gpu_peers.py) are measured where they are installed. The exit status is 1 if a part is not complete, a
product is wrong, or a sequence's bits depend on others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import print_table
from gpu_report import Values, brief, failures, markdown, plot, tables, title

ROOFLINE = Path(__file__).parents[1] / "docs" / "gpu-roofline.svg"
WIDTH = 140


@dataclass(frozen=True)
class Part:
    """A function in a module: it takes `gpu_models.Models` and yields results, each a dataclass."""

    module: str
    seconds: float  # at most, but for the last result

    def run(self, name: str, models: object) -> Iterator[Any]:
        function: Callable[[object], Iterator[Any]] = getattr(import_module(self.module), name)
        return function(models)


PARTS = {
    "ceilings": Part("gpu_kernels", 15),
    "products": Part("gpu_kernels", 150),
    "load": Part("gpu_models", 80),
    "streams": Part("gpu_models", 100),
    "graphs": Part("gpu_models", 25),
    "prefill": Part("gpu_models", 15),
    "invariance": Part("gpu_models", 30),
    "large": Part("gpu_models", 55),
    "warm_up": Part("gpu_models", 60),
}


def measure(name: str, part: Part, models: object, until: float) -> Values:
    """Run a part: its results, its seconds, and what went wrong, if anything."""
    results: list[Values] = []
    problem = ""
    started = time.monotonic()
    ends = min(started + part.seconds, until)
    try:
        if started >= until:
            raise TimeoutError("no time was left for it")
        for result in part.run(name, models):
            results.append(asdict(result))
            print(f"{time.monotonic() - started:6.1f} s  {brief(results[-1])}", flush=True)
            if time.monotonic() > ends:
                problem = f"stopped after {time.monotonic() - started:.0f} s"
                break
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:1000]
        print(f"{name} failed: {problem}", file=sys.stderr, flush=True)
    return {"results": results, "seconds": time.monotonic() - started, "problem": problem}


def run(names: list[str], folder: Path | None, limit: float, out: Path | None) -> Values:
    """Run parts one after the other."""
    import torch
    import triton
    from gpu_models import Models

    import squawq

    until = time.monotonic() + limit
    found: Values = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "squawq": squawq.__version__,
        "parts": {},
    }
    models = Models(folder)
    try:
        for name in names:
            print(f"{name}:", flush=True)
            found["parts"][name] = measure(name, PARTS[name], models, until)
            if out is not None:
                out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        models.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--folder", type=Path, help="keeps the random 8B; default: a temporary folder")
    parser.add_argument("--limit", type=float, default=460, help="seconds; no part starts later")
    parser.add_argument("--plot", type=Path, metavar="JSON", help=f"draw {ROOFLINE.name} and end")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the tables as markdown and end")
    args = parser.parse_args()
    if args.plot:
        plot(json.loads(args.plot.read_text()), ROOFLINE)
        print(ROOFLINE)
        return
    if args.markdown:
        print(markdown(json.loads(args.markdown.read_text())), end="")
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("there is no NVIDIA GPU here")
    found = run([name for name in PARTS if name in args.only], args.folder, args.limit, args.json)
    print(title(found))
    for table in tables(found):
        print_table(table.title, table.headings, table.rows, WIDTH)
    if wrong := failures(found):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
