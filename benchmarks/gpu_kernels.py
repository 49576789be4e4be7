"""The parts of gpu.py that measure kernels: the card's ceilings, and INT4 products beside float16 and peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from checkpoints import LEVEL_STD
from gpu_peers import Multiply, find_peers
from gpu_report import ERROR
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import Gemm
from squawq.backends.cuda import backend as cuda_backend
from squawq.backends.cuda import launch
from squawq.format.groupwise import PER_WORD, from_gemm

GROUP = 128
COPY_BYTES = 2**30
ROTATED_BYTES = 200e6  # of the weights that a graph goes through: no cache has the next one
SHAPES = (  # out x in, of the linears of Llama-3.1-8B and 70B
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
FULL_SECONDS = 75  # then fewer replays
PEER_SECONDS = 60  # for all peers: some compile kernels for each shape


@dataclass(frozen=True)
class Ceilings:
    """What the card reaches: copies count bytes read and written; products are torch's of 8192 x 8192 x 8192."""

    copy_gb_s: float
    bf16_tflops: float
    fp16_tflops: float


@dataclass
class Product:
    """One shape with one number of rows. Times in microseconds.

    kernel: the product alone; up to 384 rows as a decode step runs it, whose next kernel adds the partial sums.
    whole: `Backend.matmul`, with the sum of the parts and the rounding to float16.
    error: largest difference from the product of the dequantized weight, relative to the largest result.
    share: of copy bandwidth that the kernel reaches, counting the weight's packed bytes.
    peers: time of each, or why there is none.
    """

    out: int
    in_: int
    rows: int
    kernel: float
    whole: float
    fp16: float
    share: float
    error: float
    peers: dict[str, float | str] = field(default_factory=dict)


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def graph_microseconds(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Time of a call: the best of some replays of one CUDA graph that makes all calls in turn."""
    calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    best = math.inf
    for _ in range(replays):
        first, last = event(), event()
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        best = min(best, first.elapsed_time(last) * 1e3 / len(calls))
    return best


@cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a kernel: torch's own copy in a CUDA graph is a slower one."""
    source = torch.empty(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / graph_microseconds([partial(torch.neg, source, out=target)] * 10) * 1e6


def ceilings(_: object) -> Iterator[Ceilings]:
    """Copy bandwidth and matrix products of 16-bit numbers."""
    speeds = []
    copy_bandwidth()  # lets the card's clocks rise
    copy_bandwidth.cache_clear()
    for dtype in (torch.bfloat16, torch.float16):
        x, y = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(x)

        speeds.append(2 * 8192**3 / graph_microseconds([partial(torch.mm, x, y, out=out)] * 5) / 1e6)
    yield Ceilings(copy_bandwidth() / 1e9, *speeds)


def packed_bytes(out: int, in_: int) -> int:
    """Integers, float16 scales and 4-bit zeros of a weight."""
    return out * in_ // 2 + out * (in_ // GROUP) * 5 // 2


def random_gemm(out: int, in_: int, device: str = "cuda") -> Gemm:
    """A weight in AWQ's layout: random integers, zeros of 7 or 8; unit activations give outputs near 1."""

    def words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (rows, out // PER_WORD), dtype=torch.int32, device=device)

    scales = torch.rand(in_ // GROUP, out, device=device).mul_(0.2).add_(0.9) / (LEVEL_STD * math.sqrt(in_))
    return words(in_), scales.half(), (words(in_ // GROUP) & 0x11111111) + 0x77777777


def dense_weights(out: int, in_: int, dtype: torch.dtype) -> list[Tensor]:
    """Random weights, together larger than any cache."""
    count = max(2, math.ceil(ROTATED_BYTES / (2 * out * in_)))
    return [torch.randn(out, in_, device="cuda", dtype=dtype) / math.sqrt(in_) for _ in range(count)]


def linear_microseconds(x: Tensor, weights: Sequence[Tensor]) -> float:
    """torch's own product, in the weights' dtype."""
    return graph_microseconds([partial(F.linear, x, weight) for weight in weights])


def error_of(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((found.float() - expected).abs().max() / expected.abs().max())


class Peers:
    """Other kernels with the weights of one shape. Whatever goes wrong with one is its result."""

    def __init__(self) -> None:
        self._peers, self._missing = find_peers()
        self._weights: dict[str, list[Multiply]] = {}
        self._left = float(PEER_SECONDS)

    def pack(self, gemms: Sequence[Gemm]) -> None:
        self._weights.clear()
        for name, prepare in list(self._peers.items()):
            with self._attempt(name) as problems:
                self._weights[name] = [prepare(gemm) for gemm in gemms]
            self._missing.update(problems)

    def microseconds(self, x: Tensor, expected: Tensor) -> dict[str, float | str]:
        """Time of each, or why there is none."""
        found: dict[str, float | str] = dict(self._missing)
        for name, weights in list(self._weights.items()):
            with self._attempt(name) as problems:
                if (error := error_of(weights[0](x), expected)) > ERROR:
                    raise ArithmeticError(f"its results are wrong by {error:.1e}")
                found[name] = graph_microseconds([partial(multiply, x) for multiply in weights], 3)
            found.update(problems)
        return found

    @contextmanager
    def _attempt(self, name: str) -> Iterator[dict[str, str]]:
        """Puts what goes wrong in the block into the dictionary; nothing runs once the time for peers is over."""
        problems: dict[str, str] = {}
        started = time.perf_counter()
        try:
            yield problems
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"[:200]
        self._left -= time.perf_counter() - started
        if self._left <= 0:
            self._weights.clear()
            self._missing.update(dict.fromkeys(self._peers, "the time for peers was over"))
            self._peers = {}


class Shape:
    """The weights of one shape: packed by the backend, dequantized, and float16 ones."""

    def __init__(self, out: int, in_: int, peers: Peers) -> None:
        self.out, self.in_, self.peers = out, in_, peers
        self.backend = backend_for("cuda")
        count = max(2, math.ceil(ROTATED_BYTES / packed_bytes(out, in_)))
        gemms = [random_gemm(out, in_) for _ in range(count)]
        self.packed = [self.backend.pack_int4(out, in_, GROUP, [gemm]) for gemm in gemms]
        self.exact = from_gemm(*gemms[0]).dequantize()
        self.dense = dense_weights(out, in_, torch.float16)
        peers.pack(gemms)

    def measure(self, rows: int, replays: int) -> Product:
        x = torch.randn(rows, self.in_, device="cuda", dtype=torch.float16)
        expected = x.float() @ self.exact.T
        error = error_of(self.backend.matmul(x, self.packed[0]), expected)
        kernel = whole = graph_microseconds(
            [partial(self.backend.matmul, x, weight) for weight in self.packed], replays
        )
        if rows <= cuda_backend.FEW_ROWS_INT4:
            kernel = self.few_rows(x, replays)
        share = packed_bytes(self.out, self.in_) / kernel * 1e6 / copy_bandwidth()
        fp16, peers = linear_microseconds(x, self.dense), self.peers.microseconds(x, expected)
        return Product(self.out, self.in_, rows, kernel, whole, fp16, share, error, peers)

    def few_rows(self, x: Tensor, replays: int) -> float:
        """The kernel of decode steps."""
        weights: Any = self.packed
        parts = torch.empty(launch.splits(weights[0]), len(x), self.out, device="cuda")
        return graph_microseconds([partial(launch.matmul, x, weight, parts) for weight in weights], replays)


def products(_: object) -> Iterator[Product]:
    """INT4 products of all shapes and rows."""
    started, peers = time.perf_counter(), Peers()
    for out, in_ in SHAPES:
        shape = Shape(out, in_, peers)
        for rows in ROWS:
            yield shape.measure(rows, 5 if time.perf_counter() - started < FULL_SECONDS else 2)
        del shape
        torch.cuda.empty_cache()
