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
    NORMED: tl.constexpr,  # False: out = hidden
    LIMIT: tl.constexpr,  # the largest number of out's dtype
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
    if NORMED:
        mean = tl.sum(h * h, 0) / N
        h = h * tl.rsqrt(mean + eps) * scale
    else:
        h = tl.clamp(h, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + at, h.to(out.dtype.element_ty), mask=here)


@triton.jit
def head_scales_kernel(
    partial,  # [splits, rows, WIDTH]
    bias,
    scales,  # float32 [rows, 2]: of queries, of keys
    rows,
    eps,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    QUERY: tl.constexpr,  # numbers of all query heads
    KEY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """1 / sqrt(mean of squares + eps) of all queries of a row, and of all keys: for norms that are not of each head."""
    row, part = tl.program_id(0), tl.program_id(1)
    await_inputs(DEPENDENT)
    size = tl.where(part == 0, QUERY, KEY)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        n = start + tl.arange(0, BLOCK)
        at = part * QUERY + n
        x = sum_parts(partial, row * WIDTH + at, rows * WIDTH, SPLITS, n < size)
        if BIASED:
            x += tl.load(bias + at, mask=n < size, other=0.0)
        total += x * x
    tl.store(scales + row * 2 + part, tl.rsqrt(tl.sum(total, 0) / size + eps))


@triton.jit
def rotate_and_store_kernel(
    partial,  # [splits, rows, (HEADS + 2 * KV) * D]
    bias,
    query_norm,  # float32 [D]; [HEADS * D] if WHOLE
    key_norm,
    scales,  # float32 [rows, 2] if WHOLE, see head_scales_kernel
    cosine,  # float32 [rows, columns], from the layer's first column on
    sine,
    columns,
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
    WHOLE: tl.constexpr,
    ROPE_FIRST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,  # rotated ones of a head
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
    if INTERLEAVED:
        one, two = 2 * i, 2 * i + 1
    elif half == PAIRS:
        one, two = i, half + i
    else:  # what is not rotated follows, in pairs of neighbours
        one, two = tl.where(i < PAIRS, i, 2 * i), tl.where(i < PAIRS, PAIRS + i, 2 * i + 1)
    if BIASED:
        b0 = tl.load(bias + head * D + one, mask=here, other=0.0)
        b1 = tl.load(bias + head * D + two, mask=here, other=0.0)
    await_inputs(DEPENDENT)
    width: tl.constexpr = (HEADS + 2 * KV) * D
    at = row * width + head * D
    first = sum_parts(partial, at + one, rows * width, SPLITS, here)
    second = sum_parts(partial, at + two, rows * width, SPLITS, here)
    if BIASED:
        first += b0
        second += b1
    rotated = head < HEADS + KV
    if NORMED:
        query, key = here & (head < HEADS), here & (head >= HEADS) & rotated
        q0, k0 = 0, 0
        if WHOLE:
            q0, k0 = head * D, (head - HEADS) * D
            scale = tl.load(scales + row * 2 + tl.where(head < HEADS, 0, 1))
        else:
            scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        w0 = tl.load(query_norm + q0 + one, mask=query, other=0.0) + tl.load(key_norm + k0 + one, mask=key, other=0.0)
        w1 = tl.load(query_norm + q0 + two, mask=query, other=0.0) + tl.load(key_norm + k0 + two, mask=key, other=0.0)
        if not ROPE_FIRST:
            first = tl.where(rotated, first * scale * w0, first)
            second = tl.where(rotated, second * scale * w1, second)
    turns = here & (i < PAIRS)
    cos = tl.load(cosine + row * columns + i, mask=turns, other=1.0)
    sin = tl.load(sine + row * columns + i, mask=turns, other=0.0)
    turned = tl.where(rotated, first * cos - second * sin, first)
    second = tl.where(rotated, second * cos + first * sin, second)
    if NORMED and ROPE_FIRST:  # a rotation leaves the mean of squares as it is
        turned = tl.where(rotated, turned * scale * w0, turned)
        second = tl.where(rotated, second * scale * w1, second)
    to = queries + row.to(tl.int64) * query_stride + head * D
    tl.store(to + one, turned.to(queries.dtype.element_ty), mask=here & (head < HEADS))
    tl.store(to + two, second.to(queries.dtype.element_ty), mask=here & (head < HEADS))
    slot = tl.load(slots + row)
    if slot >= 0:
        low = tl.clamp(turned, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(keys.dtype.element_ty)
        high = tl.clamp(second, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(keys.dtype.element_ty)
        kv = head - HEADS - tl.where(rotated, 0, KV)
        place = ((slot // PAGE * KV + kv) * PAGE + slot % PAGE) * D
        key, value = here & (head >= HEADS) & rotated, here & (head >= HEADS + KV)
        tl.store(keys + place + one, low, mask=key)
        tl.store(keys + place + two, high, mask=key)
        tl.store(values + place + one, low, mask=value)
        tl.store(values + place + two, high, mask=value)


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
def embed_kernel(
    ids,  # int64 [rows]; < 0: what is in `sampled`
    positions,  # int64 [rows]; < 0: a row of padding
    slots,  # int64 [rows]
    sampled,  # int32 [rows]
    embedding,  # [tokens, N]
    first,  # of its tokens; others are zeros, other ranks have them
    tokens,
    frequencies,  # float32 [2, half]: and magnitudes
    scale,  # of the embedding
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
    tl.store(hidden + row * N + n, found.to(tl.float32) * scale, mask=n < N)
    i = tl.arange(0, HALF)
    angle = position.to(tl.float32) * tl.load(frequencies + i, mask=i < half, other=0.0)
    magnitude = tl.load(frequencies + half + i, mask=i < half, other=0.0)
    tl.store(cosine + row * half + i, tl.cos(angle) * magnitude, mask=i < half)
    tl.store(sine + row * half + i, tl.sin(angle) * magnitude, mask=i < half)


@triton.jit
def capped(x, cap):
    """cap * tanh(x / cap)."""
    return cap * (2 * tl.sigmoid(2 * x / cap) - 1)


@triton.jit
def soft_cap_kernel(x, N, cap, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr):
    """x float32 [rows, N] = cap * tanh(x / cap)."""
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * N + n
    await_inputs(DEPENDENT)
    tl.store(x + at, capped(tl.load(x + at, mask=n < N, other=0.0), cap), mask=n < N)
