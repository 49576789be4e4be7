"""Measures the time of quantization: by number of calibration tokens, and for a large model's layer next to AutoAWQ.

    python benchmarks/quantize_time.py growth [--tokens 8192 32768 131072] [--shape llama-3.2-1b --layers 1]
    python benchmarks/quantize_time.py layer --peer PYTHON [--shape llama-3.1-8b] [--tokens 8192] [--patience 8]

growth: squawq with more and more tokens. A profile splits its time into the passes over all tokens, which gather the
statistics, and the rest, which should not grow. The model is the demo model unless a shape is given.
layer: one decoder layer of the shape with random weights and a small vocabulary, quantized by squawq and then by
AutoAWQ 0.2.9 (PYTHON is the interpreter of its environment, peers/README.md). Prints the ratio and the projected time
for all layers of the model. With --patience 8, AutoAWQ is stopped after eight times squawq's time.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, write_checkpoint
from common import print_table, quantize_apart
from transformers.models.llama import modeling_llama  # imported before timing starts

import squawq
from squawq import QuantConfig
from squawq.demo import demo_model
from squawq.layerwise.blocks import Block
from squawq.quantization.states import Replay

assert modeling_llama.LlamaForCausalLM
VOCAB = 1024  # vocabulary of the random models, and upper bound of the ids
SEQLEN = 512
STARTING = 60.0  # seconds AutoAWQ may take to start, not counted


def token_rows(tokens: int) -> list[list[int]]:
    """Random token ids; the time does not depend on their values."""
    generator = random.Random(0)
    return [[generator.randrange(VOCAB) for _ in range(SEQLEN)] for _ in range(tokens // SEQLEN)]


def random_model(args: argparse.Namespace, folder: Path) -> Path:
    """A checkpoint of the shape's layers."""
    model = folder / "model"
    write_checkpoint(model, replace(SHAPES[args.shape], vocab=VOCAB), args.layers, quantized=False)
    return model


def seconds_in(profile: pstats.Stats, function: object) -> float:
    """Seconds in a Python function and everything it calls."""
    code = getattr(function, "__wrapped__", function).__code__  # type: ignore[attr-defined]
    where = (code.co_filename, code.co_firstlineno, code.co_name)
    return float(profile.stats[where][3])  # type: ignore[attr-defined]


def growth(args: argparse.Namespace, folder: Path) -> None:
    """Table of seconds by number of tokens."""
    model = demo_model() if args.shape is None else random_model(args, folder)
    quantize = squawq.quantize
    table, rests = [], []
    quantize(model, folder / "warm", QuantConfig(samples=1, seqlen=SEQLEN), calibration=token_rows(SEQLEN))
    for tokens in args.tokens:
        rows = token_rows(tokens)
        profile = cProfile.Profile()
        config = QuantConfig(samples=len(rows), seqlen=SEQLEN)
        profile.runcall(quantize, model, folder / str(tokens), config, calibration=rows)
        stats = pstats.Stats(profile)
        total = float(stats.total_tt)  # type: ignore[attr-defined]
        running = sum(seconds_in(stats, passes) for passes in (Block.run, Block.run_until_captured, Replay.settle))
        rests.append(total - running)
        table.append([f"{tokens:,}", f"{running:.1f}", f"{total - running:.1f}", f"{total:.1f}"])
        print(*table[-1], file=sys.stderr, flush=True)
    name = args.shape or "demo model"
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    headings = ["calibration tokens", "seconds in passes over tokens", "the rest", "all"]
    print_table(f"{name}, {threads} threads, profiled", headings, table)
    more, longer = args.tokens[-1] / args.tokens[0], rests[-1] / rests[0]
    print(f"{more:g} times the tokens: the rest takes {longer:.2f} times as long")


def layer(args: argparse.Namespace, folder: Path) -> None:
    """squawq's and AutoAWQ's seconds for the layers, and projected for the whole model."""
    model, rows = random_model(args, folder), folder / "rows.json"
    rows.write_text(json.dumps(token_rows(args.tokens[0])))
    layers = SHAPES[args.shape].layers
    ours = quantize_apart("squawq", sys.executable, model, folder / "squawq", rows, {})
    print("squawq", ours, file=sys.stderr, flush=True)
    ended, patience = True, args.patience and args.patience * ours["seconds"] + STARTING
    try:
        theirs = quantize_apart("autoawq", args.peer, model, folder / "autoawq", rows, {"bits": 4}, patience)
    except subprocess.TimeoutExpired:
        ended, theirs = False, {"seconds": args.patience * ours["seconds"], "peak_bytes": None}

    def row(name: str, outcome: dict[str, Any], least: str = "") -> list[str]:
        peak, seconds = outcome["peak_bytes"], outcome["seconds"]
        whole = seconds / args.layers * layers / 60
        return [name, f"{least}{seconds:.1f}", f"{peak / 2**30:.2f}" if peak else "", f"{least}{whole:.0f} min"]

    threads = os.environ.get("OMP_NUM_THREADS", "all")
    title = f"{args.shape}, {args.layers} layer(s), {args.tokens[0]:,} tokens, {threads} threads"
    table = [row("squawq", ours), row("AutoAWQ 0.2.9", theirs, "" if ended else "> ")]
    print_table(title, ["", "seconds", "peak GiB", f"all {layers} layers would take"], table)
    share = ours["seconds"] / theirs["seconds"]
    print(f"squawq takes {share:.3f} of AutoAWQ's time" + ("" if ended else " or less: that was stopped at work"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    growing, one = commands.add_parser("growth"), commands.add_parser("layer")
    growing.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    growing.add_argument("--shape", choices=SHAPES)
    one.add_argument("--tokens", type=int, nargs=1, default=[8192])
    one.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    one.add_argument("--patience", type=float, help="stop AutoAWQ after this multiple of squawq's time")
    one.add_argument("--peer", required=True, help="python of the environment with AutoAWQ")
    for command in (growing, one):
        command.add_argument("--layers", type=int, default=1, help="of a random model")
        command.add_argument("--folder", type=Path, help="where the temporary folder goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        (growth if args.command == "growth" else layer)(args, Path(folder))


if __name__ == "__main__":
    main()
