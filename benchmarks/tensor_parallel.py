"""Measures tensor parallelism on a CPU: N processes of one thread against one process of N threads.

    python benchmarks/tensor_parallel.py MODEL [--ranks 2] [--rounds 3] [--streams 1 8] [--new-tokens 64]

MODEL is an AWQ folder, such as checkpoints.py writes. Each round runs both in turn, in processes of their own
(`squawq.bench`, 128 prompt tokens); figures are medians over the rounds, and ratios are medians of each round's ratio.
Memory is the largest resident size of a process: of one process alone, and of the largest of the ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import print_table

PROMPT = 128
CHILD = """
import json, sys
from pathlib import Path
from squawq.engine import runner
from squawq.bench import bench
model, ranks, threads, streams, new_tokens, prompt = sys.argv[1], *map(int, sys.argv[2:])
peaks = []
own = runner.DecoderRunner.close
def peak(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
def close(self):
    if self._followers is not None:
        peaks.extend(peak(process.pid) for process in self._followers._processes if process.poll() is None)
    own(self)
runner.DecoderRunner.close = close
found = bench(model, prompt_tokens=prompt, new_tokens=new_tokens, streams=streams, device="cpu", threads=threads,
              tensor_parallel_size=ranks)
print(json.dumps({**found, "peak_rss_bytes": max([found["peak_rss_bytes"], *peaks])}))
"""


def measure(model: Path, ranks: int, threads: int, streams: int, new_tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(model), *map(str, (ranks, threads, streams, new_tokens, PROMPT))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    rows = []
    for streams in args.streams:
        alone, shared = [], []
        for _ in range(args.rounds):
            alone.append(measure(args.model, 1, args.ranks, streams, args.new_tokens))
            shared.append(measure(args.model, args.ranks, 1, streams, args.new_tokens))
        for name, label in (
            ("decode_tok_s", "decode, tokens/s"),
            ("prefill_tok_s", "prefill, tokens/s"),
            ("peak_rss_bytes", "largest process, GiB"),
            ("load_s", "load, s"),
        ):
            unit = 2**30 if name == "peak_rss_bytes" else 1
            one, other = ([run[name] / unit for run in runs] for runs in (alone, shared))
            ratio = statistics.median(b / a for a, b in zip(one, other, strict=True))
            middle = [f"{statistics.median(values):.2f}" for values in (one, other)]
            rows.append([f"{streams} streams: {label}", *middle, f"{ratio:.3f}"])
    title = f"{args.model.name}, {PROMPT} prompt tokens, {args.rounds} rounds, {alone[0]['isa']}"
    print_table(title, ["", f"1 x {args.ranks} threads", f"{args.ranks} x 1 thread", "ratio"], rows)


if __name__ == "__main__":
    main()
