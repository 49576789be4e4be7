"""Triton kernels between GPUs: each rank writes its part of a sum into the memory of all, and counts its arrival there.

This is a one-shot all-reduce: whoever reads the parts adds them up, in the order of ranks, so that all have the same
bits. Arrivals are counters, one a row, which the reader sets back to 0. A place in the buffers may be written again
once its readers have taken part in another exchange; so one that differs from the last must lie in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squawq.backends.cuda.elementwise import await_arrivals, await_inputs, sum_parts


@triton.jit
def push_kernel(
    parts,  # float32 [splits, rows, N]
    bias,  # float32 [N]
    buffers,  # int64 [TARGETS]: addresses of the ranks' buffers, float32
    counters,  # int64 [TARGETS]: of their arrivals, int32
    rows,
    N,
    place,  # of the first row in a buffer
    stride,  # of a row there
    arrivals,  # of the first row among the counters
    TARGETS: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Write partial sums + bias into the buffers of the first TARGETS ranks, and add 1 to each row's arrivals."""
    row = tl.program_id(0)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = n < N
    await_inputs(DEPENDENT)
    total = sum_parts(parts, row * N + n, rows * N, SPLITS, here)
    if BIASED:
        total += tl.load(bias + n, mask=here, other=0.0)
    to = place + row.to(tl.int64) * stride + n
    for rank in tl.static_range(TARGETS):
        tl.store(tl.load(buffers + rank).to(tl.pointer_type(tl.float32)) + to, total, mask=here)
    tl.debug_barrier()  # all threads have written
    for rank in tl.static_range(TARGETS):
        counter = tl.load(counters + rank).to(tl.pointer_type(tl.int32)) + arrivals + row
        tl.atomic_add(counter, 1, sem="release", scope="sys")


@triton.jit
def await_kernel(counters, wanted, ended, seen_ended, DEPENDENT: tl.constexpr):
    """Wait until each row has `wanted` arrivals, and set them back to 0."""
    await_inputs(DEPENDENT)
    row = tl.program_id(0)
    await_arrivals(counters + row, wanted, ended, seen_ended)
    tl.store(counters + row, 0)
