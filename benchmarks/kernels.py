"""Compares the matrix kernels with the machine's limits: memory bandwidth, and torch's matrix products.

    python benchmarks/kernels.py [--threads 2] [--rounds 15] [--isa avx512 avx2]
        [--weight 14336 4096 --copies 12 --tokens 512 --head 128256 2048]

One token: a 4-bit weight (outputs, inputs) in groups of 128, with several copies read in turn so that caches do not
help, and an int8 head. The figure is gigabytes per second of integers, scales and zeros; the baseline sums an int64
array with the same number of threads. torch's own int4 kernel, in bfloat16, where it is fastest, is shown as well. Many
tokens: operations per second against torch's F.linear in float32. Baseline and kernel alternate after a warm-up.
Figures are medians; ratios are medians over the rounds. Everything runs for each instruction set of the machine;
targets are for the best one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from common import print_table
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.cpu import library
from squawq.backends.cpu.packed import PackedInt4, PackedInt8
from squawq.errors import ConfigError

GROUP = 128
READ_BYTES = 2**29
PRODUCT_ROUNDS = 5  # at most, because they take long
Speed = Callable[[], float]


def speed(amount: float, work: Callable[[], object]) -> float:
    """Billions per second."""
    started = time.perf_counter()
    work()
    return amount / (time.perf_counter() - started) / 1e9


def random_int4(generator: np.random.Generator, out: int, in_: int) -> PackedInt4:
    """Random integers and zeros, one scale."""

    def words(rows: int) -> Tensor:
        return torch.from_numpy(generator.integers(-(2**31), 2**31, (rows, out // 8), dtype=np.int32))

    weight = PackedInt4(out, in_, GROUP)
    scales = torch.full((in_ // GROUP, out), 0.004, dtype=torch.float16)
    weight.fill(0, words(in_), scales, words(in_ // GROUP))
    return weight


def torch_int4(generator: np.random.Generator, out: int, in_: int) -> Callable[[Tensor], Tensor]:
    """The same weight in torch's layout: a bfloat16 scale and zero for each row and group."""
    integers = torch.from_numpy(generator.integers(0, 16, (out, in_), dtype=np.int32))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    scales = torch.full((in_ // GROUP, out, 2), 0.004, dtype=torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)
        return y

    return product


def instruction_sets() -> list[str]:
    """Instruction sets of this build and machine, best first."""
    found = []
    for name in library.ISAS[:-1]:
        try:
            library.set_isa(name)
            found.append(name)
        except ConfigError:
            pass
    return found


def row(title: str, unit: str, rounds: int, baseline: Speed, kernel: Speed, target: str = "") -> list[str]:
    """Measure both in alternation."""
    pairs = [(baseline(), kernel()) for _ in range(rounds + 1)][1:]
    base, found = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(mine / theirs for theirs, mine in pairs)
    return [title, f"{base:.1f} {unit}", f"{found:.1f} {unit}", f"{ratio:.2f}", target]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if library.load() is None:
        sys.exit("the native kernels are not built here, or SQUAWQ_ISA=torch is set")
    cpu = backend_for("cpu", "cpu")
    best, available = library.isa(), instruction_sets()
    parser.add_argument("--threads", type=int, default=library.default_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--isa", choices=available, nargs="+", default=available)
    parser.add_argument("--weight", type=int, nargs=2, default=(14336, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--head", type=int, nargs=2, default=(128256, 2048), metavar=("OUT", "IN"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library.set_threads(args.threads)
    pool = ThreadPoolExecutor(args.threads)
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), args.threads)
    generator = np.random.default_rng(0)
    out, in_ = args.weight
    one, many, dense = torch.randn(1, in_), torch.randn(args.tokens, in_), torch.randn(out, in_)
    head, head_input = PackedInt8(torch.randn(*args.head)), torch.randn(1, args.head[1])
    head_bytes = args.head[0] * (args.head[1] + 4)
    weights = [random_int4(generator, out, in_) for _ in range(args.copies)]
    weight_bytes = args.copies * out * (in_ // 2 + in_ // GROUP * 3)
    operations = 2 * args.tokens * out * in_

    def read() -> float:
        return speed(READ_BYTES, lambda: list(pool.map(np.sum, parts)))

    def once() -> float:
        return speed(weight_bytes, lambda: [cpu.matmul(one, weight) for weight in weights])

    def project() -> float:
        return speed(head_bytes, lambda: cpu.matmul(head_input, head))

    def torch_product() -> float:
        return speed(operations, lambda: torch.nn.functional.linear(many, dense))

    def product() -> float:
        return speed(operations, lambda: cpu.matmul(many, weights[0]))

    rows = []
    for isa in args.isa:
        library.set_isa(isa)
        targets = (">= 0.85", ">= 2") if isa == best else ("", "")
        few = min(args.rounds, PRODUCT_ROUNDS)
        rows.append(row(f"int4, 1 token, {isa}", "GB/s", args.rounds, read, once, targets[0]))
        rows.append(row(f"int8 head, 1 token, {isa}", "GB/s", args.rounds, read, project))
        rows.append(row(f"int4, {args.tokens} tokens, {isa}", "GOP/s", few, torch_product, product, targets[1]))
    weights.clear()
    others = [torch_int4(generator, out, in_) for _ in range(args.copies)]
    other_bytes, half = args.copies * out * (in_ // 2 + in_ // GROUP * 4), one.bfloat16()

    def torch_once() -> float:
        return speed(other_bytes, lambda: [other(half) for other in others])

    rows.append(row("torch's int4, 1 token, bfloat16", "GB/s", args.rounds, read, torch_once))
    title = f"int4 {in_} x {out} group {GROUP}, int8 head {args.head[1]} x {args.head[0]}, {args.threads} threads"
    print_table(title, ["", "reading / torch float32", "kernel", "ratio", "target"], rows)


if __name__ == "__main__":
    main()
