"""Compares squawq with llama.cpp's Q4_K_M: same shape, same threads, random weights, alternating in one run.

    python benchmarks/llamacpp.py --peer-python PYTHON [--shape llama-3.2-1b] [--threads 2] [--rounds 3]
        [--cases decode prefill streams] [--head int8] [--folder DIR]
    python benchmarks/llamacpp.py --peer-python PYTHON --model FOLDER --gguf FILE ...

PYTHON is the interpreter of an environment with llama-cpp-python, gguf and numpy. Each round measures memory bandwidth,
llama.cpp and squawq, one after the other; figures are medians over the rounds. Models are made in --folder and reused
if they exist (2 GB for the 1B shape, 4.5 GB while making them). "of limit" is the share of the speed that memory
bandwidth allows, on either side: bandwidth divided by the bytes of weights and KV cache that a step reads. Everything
that takes much memory runs in its own process, because a child's ru_maxrss starts at its parent's.

--model and --gguf name a folder of any family that squawq runs, and the same model as a GGUF file: then no model is
made, and no limit computed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import QUANT, SHAPES, Shape
from common import print_table

HERE = Path(__file__).parent
PEER = HERE / "peers" / "llamacpp_measure.py"
READ_BYTES = 2**31
READ_PASSES = 4


@dataclass(frozen=True)
class Load:
    """The workload of a run."""

    prompt_tokens: int
    new_tokens: int
    streams: int

    def flags(self, threads: int) -> list[str]:
        """The command line flags, the same for both sides."""
        values = {"prompt-tokens": self.prompt_tokens, "new-tokens": self.new_tokens, "streams": self.streams}
        return [part for name, value in (values | {"threads": threads}).items() for part in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Case:
    """A figure of a run, and its target as a multiple of llama.cpp's, with one MLP a layer and with experts."""

    title: str
    load: Load
    key: str
    target: float
    moe_target: float


CASES = {
    "decode": Case("decode, 1 stream, tok/s", Load(512, 128, 1), "decode_tok_s", 1.4, 1.3),
    "prefill": Case("prefill of 512, tok/s", Load(512, 128, 1), "prefill_tok_s", 1.7, 1.0),
    "streams": Case("decode, 8 streams, tok/s", Load(128, 128, 8), "decode_tok_s", 2.5, 2.0),
}


def run(command: Sequence[str]) -> str:
    """Return the child's last line; an error in the child ends this run, too."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def prepare(name: str, folder: Path, peer_python: str) -> tuple[Path, Path]:
    """Make the two models if they are missing; a model gets its name when it is complete."""
    checkpoint, gguf = folder / f"{name}-awq", folder / f"{name}.gguf"
    if not gguf.exists():
        subprocess.run([peer_python, str(PEER), "make", name, str(gguf)], check=True)
    if not checkpoint.exists():
        part = folder / f"{name}-awq.part"
        shutil.rmtree(part, ignore_errors=True)
        run([sys.executable, str(HERE / "checkpoints.py"), name, str(part)])
        part.rename(checkpoint)
    return checkpoint, gguf


def read_bandwidth(threads: int) -> float:
    """Bytes per second of summing an array much larger than the caches; the best of a few passes."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READ_PASSES):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds)


def weight_bytes(shape: Shape, head: str, streams: int) -> float:
    """Bytes that squawq reads in a step: nibbles, scales and zeros of every linear, and the head.

    The head has 8 bits and a scale per row, or 4 bits with a scale and a zero per 32; a router has 16 bits. Of the
    experts, as many are read as `streams` tokens take on average, each at random.
    """
    total = float(shape.vocab * (shape.hidden + 4 if head == "int8" else shape.hidden // 2 + shape.hidden // 32 * 3))
    for name, (out_features, in_features) in shape.linears().items():
        groups = in_features // QUANT.group_of(in_features)
        size = out_features * in_features // 2 + out_features * groups * 3
        if name == "mlp.gate":
            size = 2 * out_features * in_features
        read = read_experts(shape, streams) / shape.experts if ".experts." in name else 1.0
        total += shape.layers * size * read
    return total


def read_experts(shape: Shape, streams: int) -> float:
    """Experts of a layer that a step reads, on average."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** streams)


def parameters(shape: Shape) -> int:
    """Number of weights, tied embeddings counted once."""
    layer = sum(prod(size) for size in shape.linears().values()) + sum(shape.norms().values())
    return shape.layers * layer + shape.vocab * shape.hidden * (1 if shape.tied else 2) + shape.hidden


def peer_bytes(shape: Shape, whole: int, streams: int) -> float:
    """Bytes that llama.cpp reads in a step, if all its linears have as many bits on average."""
    if not shape.experts:
        return whole
    sizes = {name: prod(size) for name, size in shape.linears().items()}
    experts = shape.layers * sum(size for name, size in sizes.items() if ".experts." in name)
    unread = experts * (1 - read_experts(shape, streams) / shape.experts)
    return whole * (1 - unread / parameters(shape))


def limit(weights: float, shape: Shape, load: Load, bandwidth: float) -> float:
    """Tokens per second of all streams if a decode step took as long as reading its weights and 16-bit KV cache."""
    position = shape.layers * 2 * shape.kv_heads * (shape.head_dim or shape.hidden // shape.heads) * 2
    cache = load.streams * position * (load.prompt_tokens + load.new_tokens / 2)
    return load.streams * bandwidth / (weights + cache)


def table(
    shape: Shape | None,
    head: str,
    cases: Sequence[Case],
    found: dict[tuple[Load, str], list[dict[str, Any]]],
    bandwidth: float,
) -> list[list[str]]:
    """A row per case, then the other figures of each kind of run."""

    def pair(load: Load, key: str) -> tuple[float, float]:
        peer, ours = ([float(one[key]) for one in found[load, side]] for side in ("peer", "squawq"))
        return statistics.median(peer), statistics.median(ours)

    rows = []
    for case in cases:
        peer, ours = pair(case.load, case.key)
        shares = ""
        if shape is not None and case.key == "decode_tok_s":
            streams, stored = case.load.streams, int(found[case.load, "peer"][0]["weight_bytes"])
            sides = (peer, peer_bytes(shape, stored, streams)), (ours, weight_bytes(shape, head, streams))
            shares = " / ".join(f"{speed / limit(size, shape, case.load, bandwidth):.0%}" for speed, size in sides)
        target = f">= {case.moe_target if shape is not None and shape.experts else case.target}"
        rows.append([case.title, f"{peer:.1f}", f"{ours:.1f}", f"{ours / peer:.2f}", target, shares])
    extras = (("time to first token, ms", "ttft_ms", 1.0), ("peak memory, GiB", "peak_rss_bytes", 2.0**30))
    for load in dict.fromkeys(case.load for case in cases):
        for title, key, unit in (*extras, ("load, s", "load_s", 1.0)):
            peer, ours = (value / unit for value in pair(load, key))
            title = f"{title} ({load.streams} x {load.prompt_tokens})"
            rows.append([title, f"{peer:.2f}", f"{ours:.2f}", f"{ours / peer:.2f}", "", ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="python of the environment with llama-cpp-python")
    parser.add_argument(
        "--shape", choices=("llama-3.2-1b", "qwen3-30b-a3b-4", "tiny", "tiny-moe"), default="llama-3.2-1b"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--head", choices=("int8", "int4"), default="int8", help="squawq's; llama.cpp's has 6 bits")
    parser.add_argument("--folder", type=Path, help="keeps the models; default: a temporary one")
    parser.add_argument("--model", type=Path, help="a folder that squawq runs, instead of --shape")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    args = parser.parse_args()
    if (args.model is None) != (args.gguf is None):
        parser.error("--model and --gguf go together")

    shape = None if args.model else SHAPES[args.shape]
    cases = [CASES[name] for name in args.cases]
    found: dict[tuple[Load, str], list[dict[str, Any]]] = {}
    bandwidths = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, gguf = args.model, args.gguf
        if shape is not None:
            checkpoint, gguf = prepare(args.shape, folder, args.peer_python)
        commands = {
            "peer": [args.peer_python, str(PEER), "measure", str(gguf)],
            "squawq": [sys.executable, "-m", "squawq", "bench", str(checkpoint), "--json", "--head", args.head],
        }
        for turn in range(args.rounds):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                bandwidths.append(pool.submit(read_bandwidth, args.threads).result())
            for load in dict.fromkeys(case.load for case in cases):
                for side, command in commands.items():
                    one = json.loads(run([*command, *load.flags(args.threads)]))
                    found.setdefault((load, side), []).append(one)
                    speeds = f"prefill {one['prefill_tok_s']:.1f}, decode {one['decode_tok_s']:.1f} tok/s"
                    print(f"round {turn + 1}, {side}: {speeds}", file=sys.stderr, flush=True)
    peer, ours = (found[cases[0].load, side][0] for side in commands)
    if shape is not None and peer["parameters"] != parameters(shape):
        sys.exit(f"llama.cpp ran {peer['parameters']:,} parameters, squawq {parameters(shape):,}: not the same shape")
    bandwidth = statistics.median(bandwidths)
    settings = f"{args.threads} threads, median of {args.rounds}, plain reading {bandwidth / 1e9:.1f} GB/s"
    title = f"{args.shape} shape, Q4_K_M and AWQ INT4 with {args.head} head, {settings}"
    if shape is None:
        title = f"{args.gguf.name} and {args.model.name} with {args.head} head, {settings}"
    headings = ["", "llama.cpp", "squawq", "ratio", "target", "of limit"]
    print_table(title, headings, table(shape, args.head, cases, found, bandwidth))
    print(f"llama-cpp-python {peer['version']}: {peer['system']}\nsquawq: {ours['isa']}")


if __name__ == "__main__":
    main()
