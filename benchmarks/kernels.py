"""The matrix kernels against what the machine can do: reading memory, and torch's own product in float32.

    python benchmarks/kernels.py [--threads 2] [--rounds 15]

One token: a 4-bit weight of 4096 x 14336, group 128, read from 12 copies in turn so that caches do not help; and an
int8 head of 128256 x 2048. Baseline: summing an int64 array with as many threads. 512 tokens: operations a second
against torch's F.linear in float32. Baseline and kernel take turns; the ratio is the median of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from common import print_table

from squawq.errors import ConfigError
from squawq.kernels import cpu

OUT, IN, GROUP, COPIES, TOKENS = 14336, 4096, 128, 12, 512
HEAD = (128256, 2048)
READ_BYTES = 2**29


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def random_int4(generator: np.random.Generator) -> cpu.PackedInt4:
    """Random integers, zeros and scales."""

    def words(rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(generator.integers(-(2**31), 2**31, (rows, columns), dtype=np.int32))

    weight = cpu.PackedInt4(OUT, IN, GROUP)
    scales = torch.full((IN // GROUP, OUT), 0.004, dtype=torch.float16)
    weight.fill(0, words(IN, OUT // 8), scales, words(IN // GROUP, OUT // 8))
    return weight


def instruction_sets() -> list[str]:
    """Those of this build and machine, best first, without plain C++."""
    found = []
    for name in cpu.ISAS[:3]:
        try:
            cpu.set_isa(name)
            found.append(name)
        except ConfigError:
            pass
    return found


def row(title: str, unit: str, pairs: Sequence[tuple[float, float]], target: str) -> list[str]:
    """A row of (baseline, kernel) pairs."""
    base, found = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(kernel / baseline for baseline, kernel in pairs)
    return [title, f"{base:.1f} {unit}", f"{found:.1f} {unit}", f"{ratio:.2f}", target]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cpu.default_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.set_threads(args.threads)
    pool = ThreadPoolExecutor(args.threads)
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), args.threads)
    generator = np.random.default_rng(0)
    weights = [random_int4(generator) for _ in range(COPIES)]
    head = cpu.PackedInt8(torch.randn(HEAD))
    dense, one, many = torch.randn(OUT, IN), torch.randn(1, IN), torch.randn(TOKENS, IN)
    head_input = torch.randn(1, HEAD[1])
    int4_bytes = COPIES * OUT * (IN // 2 + IN // GROUP * 3)

    def read() -> float:
        return READ_BYTES / timed(lambda: list(pool.map(np.sum, parts))) / 1e9

    rows = []
    for isa in instruction_sets():
        cpu.set_isa(isa)
        once: list[tuple[float, float]] = []
        heads: list[tuple[float, float]] = []
        products: list[tuple[float, float]] = []
        operations = 2 * TOKENS * OUT * IN / 1e9
        weights[0](one)
        for turn in range(args.rounds):
            base = read()
            once.append((base, int4_bytes / timed(lambda: [w(one) for w in weights]) / 1e9))
            heads.append((base, HEAD[0] * HEAD[1] / timed(lambda: head(head_input)) / 1e9))
            if turn < 5:
                torch_speed = operations / timed(lambda: torch.nn.functional.linear(many, dense))
                products.append((torch_speed, operations / timed(lambda: weights[0](many))))
        rows.append(row(f"int4, 1 token, {isa}", "GB/s", once, ">= 0.85"))
        rows.append(row(f"int8 head, 1 token, {isa}", "GB/s", heads, ""))
        rows.append(row(f"int4, {TOKENS} tokens, {isa}", "GOP/s", products, ">= 2"))
    title = f"int4 {IN} x {OUT} group {GROUP}, {args.threads} threads; baselines: reading memory, torch float32"
    print_table(title, ["", "baseline", "kernel", "ratio", "target"], rows)


if __name__ == "__main__":
    main()
