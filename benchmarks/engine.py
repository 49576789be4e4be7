"""The engine on the 1B shape: what a shared prefix saves, what Python costs, what loading takes.

    python benchmarks/engine.py [MODEL] [--folder DIR]

MODEL is any folder; default: random weights of Llama-3.2-1B's shape, made in --folder (a temporary one) and used again.

Prefix: two waves of 8 requests, each a common prefix of 512 tokens and 8 of its own; mean time to first token.
Overhead: the share of a decode step outside of the native library. Every function of the library is wrapped by a clock;
the clock's own cost, measured on a function that does nothing, is taken off the step.
Load: in a process of its own, seconds and the peak of its resident memory beside the bytes of the packed weights (as
they are read in a step) and of the embedding in the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import SHAPES
from common import print_table
from llamacpp import run, weight_bytes

from squawq.engine.engine import Engine
from squawq.engine.request import Chunk, Output, Request, SamplingParams
from squawq.engine.runner import DecoderRunner, load_runner
from squawq.kernels import cpu

PREFIX, OWN, STREAMS = 512, 8, 8
OPERATIONS = ("layers", "rms_norm", "rotary", "int8_matmul", "int4_matmul", "dense_matmul")  # of a native step
LOAD = """
import json, re, sys, time
from pathlib import Path
from squawq.engine.runner import load_runner
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before, started = peak(), time.perf_counter()
runner = load_runner(Path(sys.argv[1]), kv_tokens=4096)
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak(), "before": before}))
"""


def first_tokens(engine: Engine, prompts: Sequence[list[int]], wave: int) -> float:
    """Mean milliseconds to the first token of requests that are sent together."""
    times: list[float] = []
    done = threading.Event()

    def sink(_: Output) -> None:
        times.append(time.perf_counter())
        if len(times) == len(prompts):
            done.set()

    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.submit(Request(f"{wave}-{index}", prompt, SamplingParams(max_tokens=1, ignore_eos=True)), sink)
    done.wait()
    return (statistics.mean(times) - started) * 1e3


def prefix_row(runner: DecoderRunner) -> list[str]:
    """Second wave against the first."""
    generator = np.random.default_rng(1)
    engine = Engine(runner, max_sequences=STREAMS)
    try:
        first_tokens(engine, [generator.integers(0, runner.vocab_size, 32).tolist()], 0)
        prefix = generator.integers(0, runner.vocab_size, PREFIX).tolist()
        own = generator.integers(0, runner.vocab_size, (2, STREAMS, OWN)).tolist()
        first, second = (
            first_tokens(engine, [[*prefix, *tail] for tail in tails], wave) for wave, tails in enumerate(own, 1)
        )
    finally:
        engine.close()
    title = f"time to first token, {STREAMS} x ({PREFIX} shared + {OWN}), second wave / first"
    return [title, f"{first:.0f} ms", f"{second:.0f} ms", f"{second / first:.3f}", "<= 0.2"]


class Clock:
    """Wraps the library's functions; `seconds` and `calls` are what was spent in them."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - started
            self.calls += 1
            return result

        return clocked


def clock_cost() -> float:
    """What a wrapped call costs that is not counted in `seconds`."""
    clock = Clock()
    empty = clock.wrap(lambda *_: 0)
    started = time.perf_counter()
    for _ in range(100_000):
        empty(1, 2, 3, 4, 5)
    return (time.perf_counter() - started - clock.seconds) / 100_000


def overhead_row(runner: DecoderRunner, streams: int, steps: int = 64) -> list[str]:
    """Share of the engine's decode steps outside of the library, by the engine's own clock of its steps."""
    clock, library = Clock(), cpu.load()
    assert library is not None
    originals = {f"squawq_{name}": getattr(library, f"squawq_{name}") for name in OPERATIONS}
    engine = Engine(runner, max_sequences=streams, prefix_caching=False)
    prompts = np.random.default_rng(2).integers(0, runner.vocab_size, (streams, 64)).tolist()
    done, left = threading.Event(), streams
    decoding: list[tuple[float, float, int]] = []  # time, seconds and calls in the library, after each output

    def sink(output: Output) -> None:
        nonlocal left
        decoding.append((time.perf_counter(), clock.seconds, clock.calls))
        left -= output.finish is not None
        if not left:
            done.set()

    try:
        for name, function in originals.items():
            setattr(library, name, clock.wrap(function))
        for index, prompt in enumerate(prompts):
            engine.submit(Request(str(index), prompt, SamplingParams(max_tokens=steps, ignore_eos=True)), sink)
        done.wait()
    finally:
        engine.close()
        for name, function in originals.items():
            setattr(library, name, function)
    (began, inside_before, calls_before), (ended, inside_after, calls_after) = decoding[2 * streams], decoding[-1]
    step = (ended - began - (calls_after - calls_before) * clock_cost()) / (len(decoding) / streams - 2)
    inside = (inside_after - inside_before) / (len(decoding) / streams - 2)
    title = f"decode step outside of the kernels, {streams} stream{'s' if streams > 1 else ''}"
    return [title, f"{step * 1e3:.2f} ms", f"{(step - inside) * 1e3:.2f} ms", f"{1 - inside / step:.3f}", "<= 0.05"]


def load_row(model: Path, shape: str | None) -> list[str]:
    """Peak memory of loading against what the weights take."""
    found = json.loads(subprocess.run([sys.executable, "-c", LOAD, model], capture_output=True, check=True).stdout)
    if shape is None:
        base = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    else:
        base = weight_bytes(SHAPES[shape], "int8") + SHAPES[shape].vocab * SHAPES[shape].hidden * 2
    gained = found["peak"] - found["before"]
    title = f"memory of loading ({found['seconds']:.1f} s) / packed weights + embedding"
    return [title, f"{base / 2**30:.2f} GiB", f"{gained / 2**30:.2f} GiB", f"{gained / base:.3f}", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--folder", type=Path, help="keeps the random model; default: a temporary one")
    args = parser.parse_args()
    shape = None if args.model else "llama-3.2-1b"
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or (args.folder or Path(temporary)) / "llama-3.2-1b-awq"
        if not model.exists():
            run([sys.executable, str(Path(__file__).parent / "checkpoints.py"), "llama-3.2-1b", str(model)])
        rows = [load_row(model, shape)]
        runner = load_runner(model, kv_tokens=2 * STREAMS * (PREFIX + OWN + 16))
        runner.run([Chunk(list(range(16)), 0, [0], 1)])
        rows = [prefix_row(runner), overhead_row(runner, 1), overhead_row(runner, STREAMS), *rows]
    title = f"{model.name}, {cpu.threads()} threads, {cpu.isa()}"
    print_table(title, ["", "baseline", "found", "ratio", "target"], rows)


if __name__ == "__main__":
    main()
