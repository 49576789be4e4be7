"""Measures the accuracy cost of int8 activations and of the quantized head, next to the cost of 4-bit weights.

    python benchmarks/activations.py [MODEL] [--text FILE] [--tokens 16384] [--window 512]

MODEL is a 16-bit folder (default: the demo model), which is quantized here with default settings. The INT4
folder is run over the same windows with each runtime setting. KL (nats) and top-1 agreement are given for the INT4
folder in float32 against the 16-bit model (the cost of quantization), and for every other setting against the INT4
folder in float32. The column "of quantizing" is a KL divided by the former one. Memory: two models and the logits of
two windows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import print_table
from torch import Tensor

from squawq.backends.base import PAGE
from squawq.backends.cpu import library
from squawq.backends.sampling import Chunk
from squawq.demo import EVALUATED_TOKENS, demo_model
from squawq.engine.runner import DecoderRunner
from squawq.evaluation.metrics import Score
from squawq.evaluation.run import text_ids
from squawq.nn.loader import Options, load
from squawq.quantization.pipeline import quantize
from squawq.text.tokenizer import Tokenizer

WAYS = {  # (exact, head): whether activations stay float32, and the head's format
    "int8 activations, 16-bit head": (False, "16-bit"),
    "float32 activations, int8 head": (True, "int8"),
    "int8 activations, int8 head (default)": (False, "int8"),
    "int8 activations, int4 head": (False, "int4"),
}


def runner_of(folder: Path, window: int, exact: bool, head: str) -> DecoderRunner:
    """The folder on the CPU kernels, with pages for one window."""
    return DecoderRunner(load(folder, Options(exact=exact, head=head)), kv_tokens=window + PAGE)


def logits_of(runner: DecoderRunner, ids: Tensor) -> Tensor:
    """Return the logits [tokens, vocab] of one window."""
    chunk = Chunk(ids.tolist(), 0, range(runner.num_pages), len(ids))
    return torch.from_numpy(runner.run([chunk])[0])


def compare(runner: DecoderRunner, base: DecoderRunner, windows: Tensor) -> dict[str, Any]:
    """Return `Score.summary` of `runner` with `base` as the reference."""
    score = Score()
    for ids in windows:
        score.add(logits_of(runner, ids)[:-1], ids[1:], logits_of(base, ids)[:-1])
    return score.summary()


def row(title: str, found: dict[str, Any], quantizing: float) -> list[str]:
    """Return the table row of one setting."""
    share, agreement = found["kl_mean"] / quantizing, found["top1_agreement"]
    return [title, f"{found['perplexity']:.4f}", f"{found['kl_mean']:.6f}", f"{share:.1%}", f"{agreement:.2%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo_model())
    parser.add_argument("--text", type=Path, default=demo_model() / "held_back.txt")
    parser.add_argument("--tokens", type=int, default=EVALUATED_TOKENS)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    if library.load() is None:
        sys.exit("the native kernels are not built here, or SQUAWQ_ISA=torch is set; only they round activations")
    ids = text_ids(Tokenizer(args.model), args.text)[: args.tokens]
    count = len(ids) // args.window
    if args.window < 2 or not count:
        parser.error(f"{len(ids)} tokens do not fill a window of {args.window}")
    windows = torch.tensor(ids[: count * args.window]).view(count, args.window)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "awq"
        quantize(args.model, folder)
        base = runner_of(folder, args.window, True, "16-bit")
        whole = compare(base, runner_of(args.model, args.window, True, "16-bit"), windows)
        rows = [
            ["16-bit model", f"{whole['reference_perplexity']:.4f}", "", "", ""],
            row("INT4, float32 activations, 16-bit head", whole, whole["kl_mean"]),
        ]
        for title, (exact, head) in WAYS.items():
            found = compare(runner_of(folder, args.window, exact, head), base, windows)
            rows.append(row(title, found, whole["kl_mean"]))
    title = f"{args.model.name}, {windows.numel():,} tokens in windows of {args.window}, {library.isa()}"
    print_table(title, ["", "perplexity", "KL, nats", "of quantizing", "same likeliest"], rows)


if __name__ == "__main__":
    main()
