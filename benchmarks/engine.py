"""Benchmarks the engine on the 1B shape: prefix caching, Python overhead, loading.

    python benchmarks/engine.py [MODEL] [--folder DIR] [--threads 2] [--own 8] [--rounds 5] [--steps 64]

MODEL is an AWQ folder; default: random weights of Llama-3.2-1B's shape, made in --folder (a temporary one) and reused.
Figures are medians; ratios are medians of the ratios of values measured together.
Prefix: each round sends two waves of 8 requests that share a new prefix of 512 tokens, each with 8 tokens of its own,
and measures the mean time to first token. The first wave also computes the prefix only once, so 64 tokens compare with
576.
Overhead: every function of the native library is timed. A step lasts from one token of the first stream to its next
and includes scheduling, sampling and delivery. The cost of the timer itself is measured on an empty function and
subtracted. Overhead is step time minus library time, per step.
Load: in a separate process. The time is compared with reading the files once, and the gain of peak resident memory
with packed weights, int8 head and 16-bit embedding; one more layer is allowed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from common import print_table
from llamacpp import run

from squawq.backends.cpu import library
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine
from squawq.engine.protocol import InferenceEngine
from squawq.engine.request import FinishReason, Output, Request, SamplingParams
from squawq.engine.runner import DecoderRunner, load_runner
from squawq.format.reader import Checkpoint
from squawq.nn.loader import linear_shapes

SHAPE = "llama-3.2-1b"
PREFIX, STREAMS, PROMPT, UNSETTLED = (
    512,
    8,
    64,
    4,
)  # unsettled: tokens of the first stream before all streams have started
LOAD = """
import re, sys, time
from pathlib import Path
from squawq.engine.config import EngineConfig
from squawq.engine.runner import load_runner
def memory(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
model, block = Path(sys.argv[1]), bytearray(1 << 20)
started = time.perf_counter()
for path in model.glob("*.safetensors"):
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
read, before, started = time.perf_counter() - started, memory("VmRSS"), time.perf_counter()
runner = load_runner(model, EngineConfig(threads=int(sys.argv[2]), kv_tokens=4096))
seconds = time.perf_counter() - started
print([read, seconds, seconds / read, memory("VmHWM") - before])
"""


def serve(
    engine: InferenceEngine, prompts: Sequence[list[int]], new_tokens: int, heard: Callable[[Output], None]
) -> None:
    """Send requests together and wait until all have ended; `heard` gets their outputs in the worker thread."""
    done, reasons = threading.Event(), []

    def sink(output: Output) -> None:
        heard(output)
        if output.finish:
            reasons.append(output.finish)
            if len(reasons) == len(prompts):
                done.set()

    mark, params = time.perf_counter_ns(), SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(f"{mark} {index}", prompt, params), sink)
    done.wait()
    if set(reasons) != {FinishReason.LENGTH}:
        sys.exit(f"requests ended with {', '.join(reasons)}")


def first_tokens(engine: Engine, prompts: Sequence[list[int]]) -> float:
    """Mean milliseconds to the first token of requests sent together."""
    times, started = list[float](), time.perf_counter()
    serve(engine, prompts, 1, lambda _: times.append(time.perf_counter()))
    return (statistics.mean(times) - started) * 1e3


def prefix_row(runner: DecoderRunner, own: int, rounds: int) -> list[str]:
    """Compare second waves with first ones."""
    generator = np.random.default_rng(1)
    engine, pairs = Engine(runner, config=EngineConfig(max_num_seqs=STREAMS)), []

    def ids(*shape: int) -> Any:
        return generator.integers(0, runner.vocab_size, shape).tolist()

    try:
        first_tokens(engine, ids(STREAMS, PROMPT))  # warm up threads and pages
        for _ in range(rounds):
            prefix = ids(PREFIX)
            pairs.append([first_tokens(engine, [prefix + tail for tail in ids(STREAMS, own)]) for _ in range(2)])
    finally:
        engine.close()
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(second / first for first, second in pairs)
    title = f"time to first token, {STREAMS} x ({PREFIX} shared + {own}), second wave / first"
    return [title, f"{first:.0f} ms", f"{second:.0f} ms", f"{ratio:.3f}", "<= 0.2"]


class Clock:
    """Wraps the library's functions; `seconds` and `calls` accumulate over their calls."""

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
    """Seconds that a wrapped call takes without counting them."""
    clock = Clock()
    empty = clock.wrap(lambda *_: 0)
    started = time.perf_counter()
    for _ in range(100_000):
        empty(1, 2, 3, 4, 5)
    return (time.perf_counter() - started - clock.seconds) / clock.calls


def overhead_row(runner: DecoderRunner, streams: int, steps: int) -> list[str]:
    """Decode steps and the time they spend outside of the library."""
    clock, native = Clock(), library.load()
    wrapped = {name: clock.wrap(call) for name, call in vars(native).items() if name.startswith("squawq_")}
    engine = Engine(runner, config=EngineConfig(max_num_seqs=streams, prefix_caching=False))
    prompts = np.random.default_rng(2).integers(0, runner.vocab_size, (streams, PROMPT)).tolist()
    marks: list[
        tuple[float, float, int]
    ] = []  # at each token of the first stream: time, seconds in the library so far, calls

    def heard(output: Output) -> None:
        if output.request.endswith(" 0"):
            marks.append((time.perf_counter(), clock.seconds, clock.calls))

    try:
        with patch.dict(vars(native), wrapped):
            serve(engine, prompts, steps + UNSETTLED + 1, heard)
    finally:
        engine.close()
    step, inside, calls = np.diff(marks[UNSETTLED:], axis=0).T
    step -= calls * clock_cost()
    whole, outside = np.median(step) * 1e3, np.median(step - inside) * 1e3
    title = f"decode step, {streams} stream{'s' if streams > 1 else ''}: outside of the kernels / all of it"
    return [title, f"{whole:.2f} ms", f"{outside:.2f} ms", f"{np.median(1 - inside / step):.3f}", "<= 0.05"]


def load_rows(model: Path, threads: int, rounds: int) -> list[list[str]]:
    """Loading time against reading the files; memory gained against what has to stay."""
    checkpoint = Checkpoint(model)
    config, sizes = checkpoint.config, linear_shapes(checkpoint.config).values()
    layer = sum(out * (in_ // 2 + in_ // checkpoint.group_of(in_) * 3) for out, in_ in sizes)
    base = config.num_layers * layer + config.vocab_size * (config.hidden_size + 4 + config.hidden_size * 2)
    found = [json.loads(run([sys.executable, "-c", LOAD, str(model), str(threads)])) for _ in range(rounds)]
    read, seconds, ratio, gained = (statistics.median(values) for values in zip(*found, strict=True))
    title, memory = "peak memory of loading / packed weights and embedding", (base / 2**30, gained / 2**30)
    return [
        ["load / reading the files", f"{read:.2f} s", f"{seconds:.2f} s", f"{ratio:.1f}", "seconds"],
        [title, *(f"{size:.2f} GiB" for size in memory), f"{gained / base:.3f}", f"<= {1 + layer / base:.3f}"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--folder", type=Path, help="keeps the random model; default: a temporary one")
    parser.add_argument("--threads", type=int, default=library.default_threads())
    parser.add_argument("--own", type=int, default=8, help="tokens of a request after the prefix")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of prefix waves and loads")
    parser.add_argument("--steps", type=int, default=64, help="decode steps")
    args = parser.parse_args()
    if library.load() is None:
        sys.exit("the native kernels are not built here, or SQUAWQ_ISA=torch is set")
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or (args.folder or Path(temporary)) / f"{SHAPE}-awq"
        if not args.model and not model.exists():
            run([sys.executable, str(Path(__file__).parent / "checkpoints.py"), SHAPE, str(model)])
        rows = load_rows(model, args.threads, args.rounds)
        room = STREAMS * max(2 * (PREFIX + args.own + 16), PROMPT + args.steps + 32)
        runner = load_runner(model, EngineConfig(threads=args.threads, kv_tokens=room))
        rows.append(prefix_row(runner, args.own, args.rounds))
        rows += [overhead_row(runner, streams, args.steps) for streams in (1, STREAMS)]
    title = f"{model.name}, {args.threads} threads, {library.isa()}"
    print_table(title, ["", "baseline", "found", "ratio", "target"], rows)


if __name__ == "__main__":
    main()
