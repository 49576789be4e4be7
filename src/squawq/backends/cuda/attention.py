"""Triton kernels of attention over the paged KV cache: one query a sequence (decode), or many (prefill).

A page is [kv_heads, 16, head_dim] of keys and the same of values. A row's sums run over the same tokens in the same
order whatever else is in the batch, so its bits do not depend on the batch (He et al., Thinking Machines, 2025).
"""

from __future__ import annotations

import triton
import triton.language as tl

from squawq.backends.cuda.elementwise import await_inputs, capped


@triton.jit
def _parts(position, window, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WINDOWED: tl.constexpr):
    """Tokens, the first in sight, its block, blocks up to the end, blocks of a part, and how many parts."""
    tokens = position.to(tl.int32) + 1
    begin = 0
    if WINDOWED:
        begin = tl.maximum(tokens - window, 0)
    first = begin // BLOCK
    end = tl.cdiv(tokens, BLOCK)
    each = tl.maximum(1, tl.cdiv(end - first, CHUNKS))  # by the sequence's own length alone
    return tokens, begin, first, end, each, tl.cdiv(end - first, each)


@triton.jit
def _tempered(q, positions, beta, original):
    """Queries times 1 + beta * log(1 + floor(position / original)), as Llama 4 does."""
    factor = 1 + beta * tl.log(1 + (positions // original).to(tl.float32))
    return (q.to(tl.float32) * factor).to(q.dtype)


@triton.jit
def decode_kernel(
    queries,  # [rows, HEADS * D]
    keys,  # [pages, KV, PAGE, D]
    values,
    tables,  # int32 [rows, stride]
    positions,  # int64 [rows]; of the query. < 0: a row of padding
    sums,  # float32 [rows, HEADS, CHUNKS, D]: weighted sums of values, not yet divided
    stats,  # float32 [rows, HEADS, CHUNKS, 2]: the largest score, the sum of weights
    scale,  # of scores, times log2(e)
    cap,  # of scores, times log2(e), if CAPPED
    beta,  # see _tempered, if TEMPERED
    original,
    stride,
    window,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    SHARING: tl.constexpr,  # the power of two from HEADS / KV on, 16 at least
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two from D on
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens
    CHUNKS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    TEMPERED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Flash-decoding (Dao et al., 2023): a program takes every lanes-th part of a sequence, for one head of keys."""
    row, kv, lane, lanes = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    group: tl.constexpr = HEADS // KV
    h = tl.arange(0, SHARING)
    d = tl.arange(0, WIDTH)
    t = tl.arange(0, BLOCK)
    await_inputs(DEPENDENT)
    tokens, begin, first, end, each, chunks = _parts(tl.load(positions + row), window, BLOCK, CHUNKS, WINDOWED)
    mine = (h < group)[:, None] & (d < D)[None, :]
    q = tl.load(queries + row * HEADS * D + (kv * group + h)[:, None] * D + d[None, :], mask=mine, other=0.0)
    if TEMPERED:
        q = _tempered(q, tokens - 1, beta, original)
    table = tables + row.to(tl.int64) * stride
    for chunk in range(lane, chunks, lanes):
        top = tl.full([SHARING], -1e30, tl.float32)
        total = tl.zeros([SHARING], tl.float32)
        acc = tl.zeros([SHARING, WIDTH], tl.float32)
        start = first + chunk * each
        for block in range(start, tl.minimum(start + each, end)):
            at = block * BLOCK + t
            seen = at < tokens
            page = tl.load(table + at // PAGE, mask=seen, other=0).to(tl.int64)
            if WINDOWED:
                seen = seen & (at >= begin)
            place = ((page * KV + kv) * PAGE + at % PAGE) * D
            held = seen[:, None] & (d < D)[None, :]
            k = tl.load(keys + place[:, None] + d[None, :], mask=held, other=0.0)
            v = tl.load(values + place[:, None] + d[None, :], mask=held, other=0.0)
            scores = tl.dot(q, tl.trans(k.to(q.dtype))) * scale
            if CAPPED:
                scores = capped(scores, cap)
            scores = tl.where(seen[None, :], scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            faded = tl.exp2(top - higher)
            total = total * faded + tl.sum(weights, 1)
            acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * faded[:, None])
            top = higher
        head = kv * group + h
        place = (row * HEADS + head) * CHUNKS + chunk
        tl.store(sums + place.to(tl.int64)[:, None] * D + d[None, :], acc, mask=mine)
        tl.store(stats + place * 2, top, mask=h < group)
        tl.store(stats + place * 2 + 1, total, mask=h < group)


@triton.jit
def combine_kernel(
    sums,
    stats,
    positions,
    out,  # [rows, HEADS * D]
    window,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WINDOWED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Join the parts of each row and head, in their order."""
    row, head = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, CHUNKS)
    d = tl.arange(0, WIDTH)
    await_inputs(DEPENDENT)
    _, _, _, _, _, chunks = _parts(tl.load(positions + row), window, BLOCK, CHUNKS, WINDOWED)
    place = (row * HEADS + head) * CHUNKS
    tops = tl.load(stats + (place + c) * 2, mask=c < chunks, other=-float("inf"))
    highest = tl.max(tops, 0)
    total = 0.0
    acc = tl.zeros([WIDTH], tl.float32)
    for chunk in range(chunks):
        weight = tl.exp2(tl.load(stats + (place + chunk) * 2) - highest)
        total += weight * tl.load(stats + (place + chunk) * 2 + 1)
        part = tl.load(sums + (place + chunk).to(tl.int64) * D + d, mask=d < D, other=0.0)
        acc += weight * part
    y = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEADS * D + head * D + d, y.to(out.dtype.element_ty), mask=(d < D))


@triton.jit
def _attend(q, k, v, seen, scale, cap, top, total, acc, MASKED: tl.constexpr, CAPPED: tl.constexpr):
    """One block of keys and values more. The arithmetic is the same with and without a mask, to the bit."""
    scores = tl.dot(q, tl.trans(k.to(q.dtype)))
    if CAPPED:
        scores = capped(scores * scale, cap)
        scale = 1.0
    if MASKED:
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -higher[:, None]))
    faded = tl.exp2(top - higher)
    total = tl.fma(total, faded, tl.sum(weights, 1))
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * faded[:, None])
    return higher, total, acc


@triton.jit
def prefill_kernel(
    queries,  # [rows, HEADS * D]
    keys,
    values,
    blocks,  # int32 [programs, 4]: first row, rows, position of the first row, where the page table starts
    tables,  # int32: page tables, one after another
    out,  # [rows, HEADS * D]
    query_stride,
    scale,  # these four as in decode_kernel
    cap,
    beta,
    original,
    window,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """FlashAttention-2 (Dao, arXiv 2307.08691) over pages, for a block of queries of one sequence and one head."""
    described = blocks + tl.program_id(0) * 4
    first, rows = tl.load(described), tl.load(described + 1)
    start, table = tl.load(described + 2), tables + tl.load(described + 3)
    head = tl.program_id(1)
    kv = head // (HEADS // KV)
    i = tl.arange(0, QUERIES)
    d = tl.arange(0, WIDTH)
    t = tl.arange(0, BLOCK)
    mine = (i < rows)[:, None] & (d < D)[None, :]
    row = (first + i).to(tl.int64)[:, None]
    q = tl.load(queries + row * query_stride + head * D + d[None, :], mask=mine, other=0.0)
    position = start + i
    if TEMPERED:
        q = _tempered(q, position[:, None], beta, original)
    top = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    tokens = start + rows
    begin, seen_by_all = 0, (start + 1) // BLOCK * BLOCK
    if WINDOWED:
        begin, seen_by_all = tl.maximum(start + 1 - window, 0) // BLOCK * BLOCK, 0
    for block in range(begin, seen_by_all, BLOCK):
        at = block + t
        page = tl.load(table + at // PAGE).to(tl.int64)
        place = ((page * KV + kv) * PAGE + at % PAGE) * D
        k = tl.load(keys + place[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        v = tl.load(values + place[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        top, total, acc = _attend(q, k, v, mine, scale, cap, top, total, acc, False, CAPPED)
    for block in range(tl.maximum(begin, seen_by_all), tokens, BLOCK):
        at = block + t
        held = (at < tokens)[:, None] & (d < D)[None, :]
        page = tl.load(table + at // PAGE, mask=at < tokens, other=0).to(tl.int64)
        place = ((page * KV + kv) * PAGE + at % PAGE) * D
        k = tl.load(keys + place[:, None] + d[None, :], mask=held, other=0.0)
        v = tl.load(values + place[:, None] + d[None, :], mask=held, other=0.0)
        seen = at[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (at[None, :] > position[:, None] - window)
        top, total, acc = _attend(q, k, v, seen, scale, cap, top, total, acc, True, CAPPED)
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + row * HEADS * D + head * D + d[None, :], y.to(out.dtype.element_ty), mask=mine)
