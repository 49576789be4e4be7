"""Triton kernels of greedy sampling: the likeliest token of each row, and its log probability."""

from __future__ import annotations

import triton
import triton.language as tl

PART = 4096  # logits a program


@triton.jit
def part_kernel(logits, tops, ids, sums, V, PARTS, PART: tl.constexpr, DEPENDENT: tl.constexpr):
    """For each part of a row of float32 logits [rows, V]: its largest, that one's id, the sum of weights beside it."""
    row, part = tl.program_id(0), tl.program_id(1)
    i = part * PART + tl.arange(0, PART)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(logits + row.to(tl.int64) * V + i, mask=i < V, other=-float("inf"))
    top = tl.max(x, 0)
    first = tl.min(tl.where(x == top, i, V), 0)
    to = row * PARTS + part
    tl.store(tops + to, top)
    tl.store(ids + to, first)
    tl.store(sums + to, tl.sum(tl.exp(x - tl.where(top == -float("inf"), 0.0, top)), 0))  # NaN stays NaN


@triton.jit
def whole_kernel(tops, ids, sums, tokens, logprobs, V, PARTS, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr):
    """Join the parts: token int64 [rows] and log probability float32 [rows], NaN where logits are not finite."""
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = row * PARTS + i
    top = tl.load(tops + at, mask=i < PARTS, other=-float("inf"))
    highest = tl.max(top, 0)
    token = tl.min(tl.where((top == highest) & (i < PARTS), tl.load(ids + at, mask=i < PARTS, other=V), V), 0)
    total = tl.sum(tl.load(sums + at, mask=i < PARTS, other=0.0) * tl.exp(top - highest), 0)
    tl.store(tokens + row, tl.minimum(token, V - 1).to(tl.int64))
    tl.store(logprobs + row, -tl.log(total))
