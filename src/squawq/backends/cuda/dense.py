"""Triton kernel for weights in 16 bits or int8: few rows, such as the output head's in decode."""

from __future__ import annotations

import triton
import triton.language as tl

from squawq.backends.cuda.elementwise import await_inputs


@triton.jit
def matmul_kernel(
    x,  # [M, K]
    weight,  # [N, K], x's dtype or int8
    scales,  # float32 [N], of int8
    out,  # float32 [splits, M, N]
    M,
    N,
    K,
    split,  # blocks of a split
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x @ weight.T, in parts over the inputs, always in the same order."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, BLOCK)
    here = n < N
    await_inputs(DEPENDENT)
    acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    first = tl.program_id(1) * split
    rows = weight + n.to(tl.int64)[:, None] * K
    for block in tl.range(first, tl.minimum(first + split, tl.cdiv(K, BLOCK)), num_stages=STAGES):
        at = block * BLOCK + k
        w = tl.load(rows + at[None, :], mask=here[:, None] & (at < K)[None, :], other=0)
        t = tl.load(x + m[None, :] * K + at[:, None], mask=(m < M)[None, :] & (at < K)[:, None], other=0.0)
        if INTERPRETED:
            acc += tl.dot(w.to(tl.float32), t.to(tl.float32))
        else:
            acc = tl.dot(w.to(t.dtype), t, acc)
    if SCALED:
        acc *= tl.load(scales + n, mask=here, other=0.0)[:, None]
    to = out + tl.program_id(1) * M * N + m[None, :] * N + n[:, None]
    tl.store(to, acc, mask=here[:, None] & (m < M)[None, :])
