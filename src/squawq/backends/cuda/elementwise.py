"""Triton kernels between the products: residual and RMS norm, rotary embedding, write to the KV cache, activation,
embedding.

Each takes the partial sums [splits, rows, n] of a product and adds them in order; 16-bit activations come out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_parts(partial, at, stride, SPLITS: tl.constexpr, mask):
    total = tl.load(partial + at, mask=mask, other=0.0).to(tl.float32)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(partial + s * stride + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Wait for the kernels before, and let the next one start its own preparations."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


SPINS = tl.constexpr(256)  # reads of a counter before `seen_ended` is read
LONG = tl.constexpr(65536)  # and before `ended` is read, which lies in the host's memory: a thousand times as slow


@triton.jit
def await_arrivals(counter, wanted, ended, seen_ended):
    """Wait until other GPUs have added to this int32 up to `wanted`, or until `ended`, another, is no longer 0.

    Then `seen_ended` is set as well.
    """
    count = tl.atomic_add(counter, 0, sem="acquire", scope="sys")
    spins = 0
    while count < wanted:
        count = tl.atomic_add(counter, 0, sem="acquire", scope="sys")
        spins += 1
        if spins % SPINS == 0:
            over = tl.load(seen_ended, volatile=True)
            if spins % LONG == 0:
                over = tl.load(ended, volatile=True)
            if over != 0:
                tl.store(seen_ended, 1)
                count += wanted
    tl.debug_barrier()


@triton.jit
def add_norm_kernel(
    partial,  # [splits, rows, N]; 0 splits: nothing to add
    bias,  # float32 [N]
    hidden,  # float32 [rows, N], changed in place
    weight,  # float32 [N]
    out,  # [rows, N]
    counters,  # int32 [rows]: arrivals of partial sums from other GPUs, if AWAITED
    wanted,  # of them
    ended,  # int32: no longer 0 if nothing arrives any more
    seen_ended,
    rows,
    N,
    eps,
    AWAITED: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,  # False: the norm of partial sums + bias alone
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """hidden += partial sums + bias; out = RMS norm of hidden (Zhang and Sennrich, arXiv 1910.07467) * weight."""
    row = tl.program_id(0)
    n = tl.arange(0, WIDTH)
    here = n < N
    scale = tl.load(weight + n, mask=here, other=0.0)
    await_inputs(DEPENDENT)
    if AWAITED:
        await_arrivals(counters + row, wanted, ended, seen_ended)
        tl.store(counters + row, 0)
    at = row * N + n
    if RESIDUAL:
        h = tl.load(hidden + at, mask=here, other=0.0).to(tl.float32)
    else:
        h = tl.zeros([WIDTH], tl.float32)
    if SPLITS:
        h += sum_parts(partial, at, rows * N, SPLITS, here)
        if BIASED:
            h += tl.load(bias + n, mask=here, other=0.0)
        if RESIDUAL:
            tl.store(hidden + at, h, mask=here)
    mean = tl.sum(h * h, 0) / N
    tl.store(out + at, (h * tl.rsqrt(mean + eps) * scale).to(out.dtype.element_ty), mask=here)


@triton.jit
def rotate_and_store_kernel(
    partial,  # [splits, rows, (HEADS + 2 * KV) * D]
    bias,
    query_norm,  # float32 [D]
    key_norm,
    cosine,  # float32 [rows, D / 2]
    sine,
    slots,  # int64 [rows]; < 0: a row of padding
    queries,  # [rows, HEADS * D], of this stride
    query_stride,
    keys,  # [pages, KV, PAGE, D]
    values,
    rows,
    eps,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # D / 2, or the power of two above it
    PAGE: tl.constexpr,
    LIMIT: tl.constexpr,  # the largest number of the cache's dtype
    EACH: tl.constexpr,  # heads of a program
    DEPENDENT: tl.constexpr,
):
    """Norm and rotate queries and keys of each head (Su et al., arXiv 2104.09864); keys and values to their slots."""
    row, head = tl.program_id(0), (tl.program_id(1) * EACH + tl.arange(0, EACH))[:, None]
    half: tl.constexpr = D // 2
    i = tl.arange(0, HALF)[None, :]
    here = (i < half) & (head < HEADS + 2 * KV)
    if BIASED:
        b0 = tl.load(bias + head * D + i, mask=here, other=0.0)
        b1 = tl.load(bias + head * D + half + i, mask=here, other=0.0)
    await_inputs(DEPENDENT)
    width: tl.constexpr = (HEADS + 2 * KV) * D
    at = row * width + head * D + i
    first = sum_parts(partial, at, rows * width, SPLITS, here)
    second = sum_parts(partial, at + half, rows * width, SPLITS, here)
    if BIASED:
        first += b0
        second += b1
    rotated = head < HEADS + KV
    if NORMED:
        query, key = here & (head < HEADS), here & (head >= HEADS) & rotated
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        w0 = tl.load(query_norm + i, mask=query, other=0.0) + tl.load(key_norm + i, mask=key, other=0.0)
        w1 = tl.load(query_norm + half + i, mask=query, other=0.0) + tl.load(key_norm + half + i, mask=key, other=0.0)
        first = tl.where(rotated, first * scale * w0, first)
        second = tl.where(rotated, second * scale * w1, second)
    cos = tl.load(cosine + row * half + i, mask=here, other=0.0)
    sin = tl.load(sine + row * half + i, mask=here, other=0.0)
    turned = tl.where(rotated, first * cos - second * sin, first)
    second = tl.where(rotated, second * cos + first * sin, second)
    to = queries + row.to(tl.int64) * query_stride + head * D + i
    tl.store(to, turned.to(queries.dtype.element_ty), mask=here & (head < HEADS))
    tl.store(to + half, second.to(queries.dtype.element_ty), mask=here & (head < HEADS))
    slot = tl.load(slots + row)
    if slot >= 0:
        low = tl.clamp(turned, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(keys.dtype.element_ty)
        high = tl.clamp(second, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(keys.dtype.element_ty)
        kv = head - HEADS - tl.where(rotated, 0, KV)
        place = ((slot // PAGE * KV + kv) * PAGE + slot % PAGE) * D + i
        key, value = here & (head >= HEADS) & rotated, here & (head >= HEADS + KV)
        tl.store(keys + place, low, mask=key)
        tl.store(keys + place + half, high, mask=key)
        tl.store(values + place, low, mask=value)
        tl.store(values + place + half, high, mask=value)


@triton.jit
def activation_mul_kernel(
    partial,  # [splits, rows, 2 * N]: gate, then up
    bias,
    out,  # [rows, N]
    rows,
    N,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """activation(gate) * up (Shazeer, arXiv 2002.05202)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = n < N
    await_inputs(DEPENDENT)
    at = row * 2 * N + n
    gate = sum_parts(partial, at, rows * 2 * N, SPLITS, here)
    up = sum_parts(partial, at + N, rows * 2 * N, SPLITS, here)
    if BIASED:
        gate += tl.load(bias + n, mask=here, other=0.0)
        up += tl.load(bias + N + n, mask=here, other=0.0)
    if ACTIVATION == "silu":
        y = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        y = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        y = gate * tl.sigmoid(2 * inner)  # 0.5 * (1 + tanh(inner))
    y = tl.clamp(y * up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * N + n, y.to(out.dtype.element_ty), mask=here)


@triton.jit
def output_gate_kernel(
    partial,  # [splits, rows, N]
    bias,
    x,  # [rows, N], changed in place
    rows,
    N,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """x *= sigmoid(gate)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = n < N
    await_inputs(DEPENDENT)
    gate = sum_parts(partial, row * N + n, rows * N, SPLITS, here)
    if BIASED:
        gate += tl.load(bias + n, mask=here, other=0.0)
    y = tl.load(x + row * N + n, mask=here, other=0.0).to(tl.float32) * tl.sigmoid(gate)
    tl.store(x + row * N + n, y.to(x.dtype.element_ty), mask=here)


@triton.jit
def embed_kernel(
    ids,  # int64 [rows]; < 0: what is in `sampled`
    positions,  # int64 [rows]; < 0: a row of padding
    slots,  # int64 [rows]
    sampled,  # int32 [rows]
    embedding,  # [tokens, N]
    first,  # of its tokens; others are zeros, other ranks have them
    tokens,
    frequencies,  # float32 [half]
    hidden,  # float32 [rows, N]
    cosine,  # float32 [rows, half]
    sine,
    tables,  # int32 [rows, stride]
    stride,
    N,
    half,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A row of the embedding for each token, cosines and sines of its position, its page into the page table."""
    row = tl.program_id(0)
    position, slot = tl.load(positions + row), tl.load(slots + row)
    if position >= 0:
        tl.store(tables + row.to(tl.int64) * stride + position // PAGE, (slot // PAGE).to(tl.int32))
    n = tl.arange(0, WIDTH)
    token = tl.load(ids + row)
    if token < 0:
        token = tl.load(sampled + row).to(tl.int64)
    token -= first
    own = (token >= 0) & (token < tokens)
    found = tl.load(embedding + token * N + n, mask=(n < N) & own, other=0.0)
    tl.store(hidden + row * N + n, found.to(tl.float32), mask=n < N)
    i = tl.arange(0, HALF)
    angle = position.to(tl.float32) * tl.load(frequencies + i, mask=i < half, other=0.0)
    tl.store(cosine + row * half + i, tl.cos(angle), mask=i < half)
    tl.store(sine + row * half + i, tl.sin(angle), mask=i < half)
