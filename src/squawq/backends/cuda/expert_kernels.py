"""Triton kernels for mixtures of experts: choose experts, group tokens by expert, multiply with the chosen experts'
INT4 weights alone, and add the results of each token in one order.

A pair is a token and one of its experts; pair p is of token p // top_k. An expert's pairs fill whole tiles of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squawq.backends.cuda import int4
from squawq.backends.cuda.elementwise import await_inputs, sum_parts


@triton.jit
def choose_kernel(
    partial,  # float32 [splits, rows, OUT]: the router's logits, of which the first EXPERTS are experts'
    bias,  # float32 [EXPERTS]
    ids,  # int32 [rows, TOP_K]
    shares,  # float32 [rows, TOP_K]
    rows,
    scale,
    SPLITS: tl.constexpr,
    OUT: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # powers of two
    PLACES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The experts of a token and their weights; see `layer_ops.Routing`. Of equal scores the first is chosen."""
    row = tl.program_id(0)
    e = tl.arange(0, WIDTH)
    here = e < EXPERTS
    await_inputs(DEPENDENT)
    logits = sum_parts(partial, row * OUT + e, rows * OUT, SPLITS, here)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(here, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    keys = scores
    if BIASED:
        keys += tl.load(bias + e, mask=here, other=0.0)
    keys = tl.where(here, keys, float("-inf"))
    if GROUPS > 1:
        keys = _limit_groups(keys, e // (EXPERTS // GROUPS), e, GROUPS, TOP_GROUPS)
    k = tl.arange(0, PLACES)
    found = tl.zeros([PLACES], tl.int32)
    weights = tl.zeros([PLACES], tl.float32)
    for place in range(TOP_K):
        best = tl.minimum(tl.argmax(keys, 0), EXPERTS - 1)
        found = tl.where(k == place, best, found)
        weights = tl.where(k == place, tl.sum(tl.where(e == best, scores, 0.0), 0), weights)
        keys = tl.where(e == best, float("-inf"), keys)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(ids + row * TOP_K + k, found, mask=k < TOP_K)
    tl.store(shares + row * TOP_K + k, weights * scale, mask=k < TOP_K)


@triton.jit
def _limit_groups(keys, group, e, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """Leave the groups with the largest sums of two keys (DeepSeek-V3, arXiv 2412.19437)."""
    sums = tl.full(keys.shape, float("-inf"), tl.float32)  # each expert's group's
    for g in tl.static_range(GROUPS):
        inside = tl.where(group == g, keys, float("-inf"))
        first = tl.argmax(inside, 0)
        second = tl.max(tl.where(e == first, float("-inf"), inside), 0)
        sums = tl.where(group == g, tl.max(inside, 0) + second, sums)
    larger = tl.zeros(keys.shape, tl.int32)
    for g in tl.static_range(GROUPS):
        other = tl.max(tl.where(group == g, sums, float("-inf")), 0)
        larger += ((other > sums) | ((other == sums) & (group > g))).to(tl.int32)
    return tl.where(larger < TOP_GROUPS, keys, float("-inf"))


@triton.jit
def group_kernel(
    ids,  # int32 [pairs]
    order,  # int32 [tiles, TOKENS]: pairs, -1 where there is none
    owners,  # int32 [tiles]: the expert of each tile
    used,  # int32: tiles in use
    pairs,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Put the pairs of one expert into its tiles, in their order."""
    expert = tl.program_id(0)
    e = tl.arange(0, WIDTH)
    i = tl.arange(0, BLOCK)
    counts = tl.zeros([WIDTH], tl.int32)
    await_inputs(DEPENDENT)
    for at in range(0, pairs, BLOCK):
        there = at + i < pairs
        counts += tl.histogram(tl.load(ids + at + i, mask=there, other=0), WIDTH, mask=there)
    full = (counts + (TOKENS - 1)) // TOKENS
    first = tl.sum(tl.where(e < expert, full, 0), 0)
    own = tl.sum(tl.where(e == expert, full, 0), 0)
    count = tl.sum(tl.where(e == expert, counts, 0), 0)
    if expert == 0:
        tl.store(used, tl.sum(full, 0))
    seen = 0
    for at in range(0, pairs, BLOCK):
        hit = (tl.load(ids + at + i, mask=at + i < pairs, other=EXPERTS) == expert).to(tl.int32)
        tl.store(order + first * TOKENS + seen + tl.cumsum(hit, 0) - 1, at + i, mask=hit > 0)
        seen += tl.sum(hit, 0)
    for tile in range(own):
        tl.store(owners + first + tile, expert)
    rest = count + tl.arange(0, TOKENS)
    tl.store(order + first * TOKENS + rest, tl.full([TOKENS], -1, tl.int32), mask=rest < own * TOKENS)


@triton.jit
def grouped_matmul_kernel(
    x,  # [pairs / EACH, K]
    words,  # int16 [blocks, experts * N, 32]
    grids,  # int32 [groups, experts * N]
    order,
    owners,
    used,
    out,  # float32 [splits, pairs, N]
    pairs,
    N,
    K,
    outputs,  # experts * N
    blocks,
    split,  # blocks of a split
    EACH: tl.constexpr,  # pairs that share a row of x
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """As `int4.matmul_kernel`, for a tile of pairs of one expert and that expert's outputs."""
    tile = tl.program_id(2)
    i = tl.arange(0, 32)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    here = n < N
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, blocks)
    await_inputs(DEPENDENT)
    if tile < tl.load(used):
        pair = tl.load(order + tile * TOKENS + tl.arange(0, TOKENS))
        there = (pair >= 0)[None, :]
        tokens = x + (tl.maximum(pair, 0) // EACH).to(tl.int64)[None, :] * K
        own = tl.load(owners + tile).to(tl.int64) * N + n
        acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
        for block in tl.range(first, last, num_stages=STAGES):
            packed, g0, g1, g2, g3 = int4.load_block(words, grids, own, outputs, block, K, here, GROUP)
            k = block * 128 + i
            acc = int4.multiply(packed, g0, g1, g2, g3, tokens, k, K, there, acc, PADDED, INTERPRETED)
        to = out + (tl.program_id(1) * pairs + pair).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(to, acc, mask=here[:, None] & there)


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    partial,  # float32 [splits, rows * TOP_K, N]
    shares,  # float32 [rows, TOP_K]
    shared,  # [shared splits, rows, N]: of the shared expert
    logits,  # float32 [logit splits, rows, OUT]: the router's; the last is the shared expert's gate
    out,  # [rows, N]
    rows,
    N,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED_SPLITS: tl.constexpr,  # 0: there is no shared expert
    GATED: tl.constexpr,
    LOGIT_SPLITS: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The shared expert's output, and the weighted sum of the chosen ones', in the order in which they were chosen."""
    row = tl.program_id(0)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = n < N
    total = tl.zeros([WIDTH], tl.float32)
    await_inputs(DEPENDENT)
    if SHARED_SPLITS:
        total += sum_parts(shared, row * N + n, rows * N, SHARED_SPLITS, here)
        if GATED:
            gate = tl.load(logits + row * OUT + OUT - 1)
            for s in tl.static_range(1, LOGIT_SPLITS):
                gate += tl.load(logits + s * rows * OUT + row * OUT + OUT - 1)
            total = total / (1.0 + tl.exp(-gate))
    for k in range(TOP_K):
        pair = (row * TOP_K + k).to(tl.int64)
        found = sum_parts(partial, pair * N + n, rows.to(tl.int64) * TOP_K * N, SPLITS, here)
        total += tl.load(shares + pair) * found
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=here)
