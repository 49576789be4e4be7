"""Triton kernels of the gated delta rule (Yang et al., arXiv 2412.06464); delta_rule.py launches them.

Prompts and decode steps run the same three: the convolution, the recurrence token by token, with a few columns of a
head's state in the registers of a warp, and the norm. backends/delta_rule.py has what they compute.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squawq.backends.cuda.elementwise import await_inputs, sum_parts


@triton.jit
def added(partial, bias, row, column, width, rows, mask, SPLITS: tl.constexpr, BIASED: tl.constexpr):
    """Some columns of a row of a product of this width."""
    total = sum_parts(partial, row * width + column, rows * width, SPLITS, mask)
    if BIASED:
        total += tl.load(bias + column, mask=mask, other=0.0)
    return total


@triton.jit
def convolve_kernel(
    partial,  # [splits, rows, WIDE]: queries, keys, values, z
    bias,
    weight,  # float32 [KERNEL, CHANNELS], the oldest token's first
    inputs,  # float32 [places, KERNEL - 1, CHANNELS]
    firsts,  # int64 [rows]: the first row of each row's sequence
    places,  # int64 [rows]: of its state
    positions,  # int64 [rows]; < 0: a row of padding
    mixed,  # float32 [rows, CHANNELS]
    rows,
    scale,  # of queries
    eps,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    KEYS: tl.constexpr,  # heads
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    KEEP: tl.constexpr,  # every row is a sequence's only one: its input into `inputs`
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Causal convolution and SiLU of one head's channels; L2 norm of queries and keys."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_value = head >= 2 * KEYS
    d = tl.arange(0, WIDTH)
    here = d < tl.where(is_value, VALUE_DIM, KEY_DIM)
    channel = tl.where(is_value, 2 * KEYS * KEY_DIM + (head - 2 * KEYS) * VALUE_DIM, head * KEY_DIM) + d
    await_inputs(DEPENDENT)
    position = tl.load(positions + row)
    if position >= 0:
        first = tl.load(firsts + row)
        state = inputs + tl.load(places + row) * (KERNEL - 1) * CHANNELS + channel
        now = added(partial, bias, row, channel, WIDE, rows, here, SPLITS, BIASED)
        total = now * tl.load(weight + (KERNEL - 1) * CHANNELS + channel, mask=here, other=0.0)
        for back in tl.static_range(1, KERNEL):
            known = row - back < first
            x = added(partial, bias, row - back, channel, WIDE, rows, here & (row - back >= first), SPLITS, BIASED)
            before = here & known & (position >= back)
            if known:
                x = tl.load(state + (KERNEL - 1 + row - back - first) * CHANNELS, mask=before, other=0.0)
            total += x * tl.load(weight + (KERNEL - 1 - back) * CHANNELS + channel, mask=here, other=0.0)
        y = total * tl.sigmoid(total)
        if not is_value:
            y *= tl.rsqrt(tl.sum(y * y, 0) + eps) * tl.where(head < KEYS, scale, 1.0)
        tl.store(mixed + row * CHANNELS + channel, y, mask=here)
        if KEEP:
            for i in tl.static_range(0, KERNEL - 1):
                kept = now
                if i < KERNEL - 2:
                    old = here & (position >= KERNEL - 2 - i)
                    kept = tl.load(state + (i + 1) * CHANNELS, mask=old, other=0.0)
                tl.store(state + i * CHANNELS, kept, mask=here)


@triton.jit
def keep_kernel(
    partial,  # [splits, rows, WIDE]
    bias,
    inputs,  # float32 [places, KERNEL - 1, CHANNELS]
    sequences,  # int64 [sequences, 4]: first row, rows, position of the first row, place of its state
    rows,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The last inputs of each sequence's convolution, for its next tokens."""
    about = sequences + tl.program_id(0) * 4
    first, count, start, place = tl.load(about), tl.load(about + 1), tl.load(about + 2), tl.load(about + 3)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = channel < CHANNELS
    state = inputs + place * (KERNEL - 1) * CHANNELS + channel
    for i in tl.static_range(0, KERNEL - 1):
        token = count - (KERNEL - 1) + i  # of the chunk; below 0: one before it
        new = added(partial, bias, first + token, channel, WIDE, rows, here & (token >= 0), SPLITS, BIASED)
        old = here & (token < 0) & (start + token >= 0)
        kept = tl.load(state + (count + i) * CHANNELS, mask=old, other=0.0)
        tl.store(state + i * CHANNELS, tl.where(token >= 0, new, kept), mask=here)


@triton.jit
def recur_kernel(
    mixed,  # float32 [rows, CHANNELS]
    gates,  # [splits, rows, 2 * VALUES]: of beta, of the decay
    gates_bias,
    rate,  # float32 [VALUES]
    offset,  # float32 [VALUES]
    memory,  # float32 [places, VALUES, KEY_DIM, VALUE_DIM]
    sequences,  # int64 [sequences, 4]; where each row is a sequence's only one, see `places`
    places,  # int64 [rows]
    positions,  # int64 [rows]
    out,  # float32 [rows, VALUES * VALUE_DIM]
    rows,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ONE: tl.constexpr,  # every row is a sequence's only one
    KEY_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The recurrence of some columns of one head's state, over the tokens of one sequence."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, KEY_WIDTH)
    j = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    channels: tl.constexpr = 2 * KEYS * KEY_DIM + VALUES * VALUE_DIM
    own_rate, own_offset = tl.load(rate + head), tl.load(offset + head)
    await_inputs(DEPENDENT)
    if ONE:
        first, start, place = sequence, tl.load(positions + sequence), tl.load(places + sequence)
        count = tl.where(start >= 0, 1, 0)
    else:
        about = sequences + sequence * 4
        first, count, start, place = tl.load(about), tl.load(about + 1), tl.load(about + 2), tl.load(about + 3)
    key, value = i < KEY_DIM, j < VALUE_DIM
    both = key[:, None] & value[None, :]
    at = memory + ((place * VALUES + head) * KEY_DIM + i[:, None]) * VALUE_DIM + j[None, :]
    state = tl.load(at, mask=both & (start > 0), other=0.0)
    shared = head // (VALUES // KEYS) * KEY_DIM
    for t in range(count):
        row = first + t
        x = mixed + row * channels
        q = tl.load(x + shared + i, mask=key, other=0.0)
        k = tl.load(x + KEYS * KEY_DIM + shared + i, mask=key, other=0.0)
        v = tl.load(x + 2 * KEYS * KEY_DIM + head * VALUE_DIM + j, mask=value, other=0.0)
        beta = added(gates, gates_bias, row, head, 2 * VALUES, rows, count > 0, SPLITS, BIASED)
        raw = added(gates, gates_bias, row, VALUES + head, 2 * VALUES, rows, count > 0, SPLITS, BIASED) + own_offset
        softplus = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
        state *= tl.exp(own_rate * softplus)
        change = tl.sigmoid(beta) * (v - tl.sum(state * k[:, None], 0))
        state += k[:, None] * change[None, :]
        y = tl.sum(state * q[:, None], 0)
        tl.store(out + row * VALUES * VALUE_DIM + head * VALUE_DIM + j, y, mask=value)
    tl.store(at, state, mask=both & (count > 0))


@triton.jit
def norm_kernel(
    found,  # float32 [rows, VALUES * VALUE_DIM]
    partial,  # [splits, rows, WIDE]: z from CHANNELS on
    bias,
    weight,  # float32 [VALUE_DIM]
    out,  # [rows, VALUES * VALUE_DIM]
    rows,
    eps,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """RMS norm of one head's output, times SiLU(z)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, WIDTH)
    here = d < VALUE_DIM
    w = tl.load(weight + d, mask=here, other=0.0)
    await_inputs(DEPENDENT)
    at = row * VALUES * VALUE_DIM + head * VALUE_DIM + d
    y = tl.load(found + at, mask=here, other=0.0)
    z = added(partial, bias, row, CHANNELS + head * VALUE_DIM + d, WIDE, rows, here, SPLITS, BIASED)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / VALUE_DIM + eps) * w * z * tl.sigmoid(z)
    y = tl.clamp(y, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=here)
