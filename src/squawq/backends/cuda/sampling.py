"""Triton kernels of sampling: the next token of each row, and its log probability.

A token is drawn by the Gumbel-max trick (Gumbel, 1954): the largest of logit / temperature + noise, where the noise is
a function of the request's seed, the sequence's index in it, the number of the token and its id. Truncation sorts
nothing: top-k, top-p and min-p each keep the tokens from some logit on, so that the largest of those kept is found by
drawing from all, and drawing again from the tokens above one that is not kept (as in FlashInfer's sampling). Among
equal logits at the edge all are kept.

The sums of a row run in one order, whatever other rows there are: so its token does not depend on the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squawq.backends.cuda.elementwise import await_inputs

GROUP = tl.constexpr(64)  # neighbouring logits whose largest is kept
LISTED = tl.constexpr(128)  # most groups of which top-k is found, so the most that top_k can be
PART = 4096  # logits of a program of score_kernel
SPAN = tl.constexpr(64 * 128)  # logits that choose_kernel looks at together
ENDINGS = 16  # most tokens that min_tokens forbids

# Of a sequence: where its parameters are in `floats` and `ints`.
FLOATS, INTS = tl.constexpr(8), tl.constexpr(24)
TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE = (tl.constexpr(i) for i in range(6))
TOP_K, SEED, SEED_HIGH, INDEX, PROMPT, MIN_TOKENS, PENALIZED, COUNT, ENDING = (tl.constexpr(i) for i in range(9))
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _adjusted(x, i, step, place, floats, ints, counts, V):
    """Logits of tokens i after penalties and min_tokens. counts: times in the output; the sign bit: in the prompt."""
    own, whole = floats + place * FLOATS, ints + place * INTS
    if tl.load(whole + PENALIZED) != 0:
        count = tl.load(counts + place.to(tl.int64) * V + i, mask=i < V, other=0).to(tl.int32)
        penalty = tl.load(own + REPETITION)
        x = tl.where(count != 0, tl.where(x > 0, x / penalty, x * penalty), x)
        times = (count & 0x7FFF).to(tl.float32)
        x -= tl.load(own + FREQUENCY) * times + tl.where(times > 0, tl.load(own + PRESENCE), 0.0)
    if step < tl.load(whole + MIN_TOKENS):
        for j in range(tl.load(whole + COUNT)):
            x = tl.where(i == tl.load(whole + ENDING + j), -float("inf"), x)
    return x


@triton.jit
def _noise(i, step, whole):
    """Gumbel noise of tokens i, from Philox (Salmon et al., SC 2011)."""
    low = tl.load(whole + SEED).to(tl.int64) & 0xFFFFFFFF
    seed = (tl.load(whole + SEED_HIGH).to(tl.int64) << 32) | low
    zero = i * 0
    bits, _, _, _ = tl.philox(seed, i, zero + step, zero + tl.load(whole + INDEX), zero)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # in (0, 1)
    exponential = tl.where(u < 1e-3, u * (1 + u * (0.5 + u * 0.3333333)), -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["V", "PARTS"])
def score_kernel(
    logits,  # float32 [rows, V]
    places,  # int32 [rows]: the sequence's place in floats, ints and counts
    positions,  # int64 [rows]: of the row's token in its sequence; < 0: a row of padding
    floats,
    ints,
    counts,  # int16 [places, V]
    tops,  # float32 [rows, PARTS]: of each part of a row, the largest logit
    sums,  # and the sum of exp(logit - that)
    masses,  # the same after penalties, by the temperature
    bests,  # the largest after noise
    ids,  # int32: its token
    noisy,  # float32 [rows, V]: logits after penalties, temperature and noise
    maxima,  # float32 [rows, PARTS * PART / GROUP]: the largest after penalties
    V,
    PARTS,
    PART: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One part of a row. What greedy sampling does not need is left as it was."""
    row, part = tl.program_id(0), tl.program_id(1)
    i = part * PART + tl.arange(0, PART)
    await_inputs(DEPENDENT)
    position = tl.load(positions + row).to(tl.int32)
    if position >= 0:
        place = tl.load(places + row)
        whole = ints + place * INTS
        temperature = tl.load(floats + place * FLOATS + TEMPERATURE)
        x = tl.load(logits + row.to(tl.int64) * V + i, mask=i < V, other=-float("inf"))
        to = row * PARTS + part
        top = tl.max(x, 0)
        tl.store(tops + to, top)
        tl.store(sums + to, tl.sum(tl.exp(x - tl.where(top == -float("inf"), 0.0, top)), 0))  # NaN stays NaN
        step = position + 1 - tl.load(whole + PROMPT)
        x = _adjusted(x, i, step, place, floats, ints, counts, V)
        if temperature > 0:
            largest = tl.max(tl.reshape(x, [PART // GROUP, GROUP]), 1)
            tl.store(maxima + to * (PART // GROUP) + tl.arange(0, PART // GROUP), largest)
            top = tl.max(largest, 0)
            weights = tl.exp((x - tl.where(top == -float("inf"), 0.0, top)) / temperature)
            tl.store(masses + to, tl.sum(weights, 0))
            x = x / temperature + _noise(i, step, whole)
            tl.store(noisy + row.to(tl.int64) * V + i, x, mask=i < V)
        best = tl.max(x, 0)
        tl.store(bests + to, best)
        tl.store(ids + to, tl.min(tl.where(x == best, i, V), 0))


@triton.jit
def _key(x):
    """int32 in the order of float32."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _kth(keys, k):
    """The k-th largest of int32 keys, or LOWEST where there are fewer above it."""
    found = tl.full([], LOWEST, tl.int64)
    for bit in range(32):
        higher = found + (tl.full([], 1, tl.int64) << (31 - bit))
        found = tl.where(tl.sum((keys.to(tl.int64) >= higher).to(tl.int32), 0) >= k, higher, found)
    return found.to(tl.int32)


@triton.jit
def _tokens(chunk, listed, chosen, top_k):
    """Ids of a chunk of SPAN tokens: of the groups that are listed, or of all in order; -1 where there is none."""
    at = tl.arange(0, SPAN)
    if top_k > 0:
        first = tl.load(chosen + at // GROUP, mask=at // GROUP < listed, other=-1)
        i = tl.where(first < 0, -1, first * GROUP + at % GROUP)
    else:
        i = chunk * SPAN + at
    return i


@triton.jit
def _above(
    pivot, kth, floor, peak, row, place, step, logits, floats, ints, counts, noisy, maxima, chosen, listed, V, GROUPS
):
    """Of the tokens above `pivot` and not under the k-th: their weight, which top_p counts; and the largest after noise
    of those that are not below `floor` either, with its token. So top_p counts tokens that min_p leaves out."""
    temperature = tl.load(floats + place * FLOATS + TEMPERATURE)
    top_k = tl.load(ints + place * INTS + TOP_K)
    mass = tl.zeros([SPAN], tl.float32)
    best = tl.full([SPAN], -float("inf"), tl.float32)
    token = tl.full([SPAN], 0, tl.int32)
    chunks = tl.where(top_k > 0, 1, tl.cdiv(GROUPS, LISTED))
    for chunk in range(chunks):
        group = chunk * LISTED + tl.arange(0, LISTED)
        largest = tl.max(tl.load(maxima + row * GROUPS + group, mask=group < GROUPS, other=-float("inf")), 0)
        if (largest > pivot) | (top_k > 0):
            i = _tokens(chunk, listed, chosen, top_k)
            there = (i >= 0) & (i < V)
            x = tl.load(logits + row.to(tl.int64) * V + i, mask=there, other=-float("inf"))
            x = _adjusted(x, tl.where(there, i, V), step, place, floats, ints, counts, V)
            kept = there & (x > pivot) & (_key(x) >= kth)
            mass += tl.where(kept, tl.exp((x - peak) / temperature), 0.0)
            kept = kept & (x >= floor)
            drawn = tl.load(noisy + row.to(tl.int64) * V + i, mask=kept, other=-float("inf"))
            token = tl.where(drawn > best, i, token)
            best = tl.maximum(best, drawn)
    highest = tl.max(best, 0)
    return tl.sum(mass, 0), highest, tl.min(tl.where(best == highest, token, V), 0)


@triton.jit(do_not_specialize=["V", "PARTS"])
def choose_kernel(
    logits,
    places,
    positions,
    floats,
    ints,
    counts,
    tops,
    sums,
    masses,
    bests,
    ids,
    noisy,
    maxima,
    chosen,  # int32 [rows, LISTED]: groups
    tokens,  # int32 [places]
    logprobs,  # float32 [places]; not finite where no token can be chosen
    V,
    PARTS,
    PER_PART: tl.constexpr,  # groups
    WIDTH: tl.constexpr,  # the power of two from PARTS on
    DEPENDENT: tl.constexpr,
):
    """A row's token from its parts. The log probability is that of the logits as they came."""
    row = tl.program_id(0)
    part = tl.arange(0, WIDTH)
    await_inputs(DEPENDENT)
    position = tl.load(positions + row).to(tl.int32)
    if position >= 0:
        place = tl.load(places + row)
        own, whole = floats + place * FLOATS, ints + place * INTS
        step = position + 1 - tl.load(whole + PROMPT)
        at, here = row * PARTS + part, part < PARTS
        top = tl.load(tops + at, mask=here, other=-float("inf"))
        highest = tl.max(top, 0)
        total = tl.sum(tl.load(sums + at, mask=here, other=0.0) * tl.exp(top - highest), 0)
        best = tl.load(bests + at, mask=here, other=-float("inf"))
        drawn = tl.max(best, 0)
        token = tl.min(tl.where((best == drawn) & here, tl.load(ids + at, mask=here, other=V), V), 0)
        temperature, top_p, min_p = tl.load(own + TEMPERATURE), tl.load(own + TOP_P), tl.load(own + MIN_P)
        top_k = tl.load(whole + TOP_K)
        if (temperature > 0) & ((top_p < 1) | (min_p > 0) | (top_k > 0)):
            groups = PARTS * PER_PART
            group = tl.arange(0, WIDTH * PER_PART)
            largest = tl.load(maxima + row * groups + group, mask=group < groups, other=-float("inf"))
            peak = tl.max(largest, 0)
            mine = chosen + row * LISTED
            listed, kth = LISTED + 0, LOWEST + 0
            floor = -float("inf")
            if min_p > 0:
                floor = peak + temperature * tl.log(min_p)
            if top_k > 0:  # the k largest logits are in the groups of the k largest maxima
                keys = _key(largest)
                edge = _kth(keys, top_k)
                above, equal = keys > edge, (keys == edge) & (group < groups)
                more = tl.sum(above.to(tl.int32), 0)
                place_of = tl.where(above, tl.cumsum(above.to(tl.int32), 0), more + tl.cumsum(equal.to(tl.int32), 0))
                tl.store(mine + place_of - 1, group, mask=(above | equal) & (place_of <= LISTED))
                tl.debug_barrier()
                listed = tl.minimum(more + tl.sum(equal.to(tl.int32), 0), LISTED)
                i = _tokens(0, listed, mine, top_k)
                there = (i >= 0) & (i < V)
                x = tl.load(logits + row.to(tl.int64) * V + i, mask=there, other=-float("inf"))
                x = _adjusted(x, tl.where(there, i, V), step, place, floats, ints, counts, V)
                kth = _kth(tl.where(there, _key(x), LOWEST), top_k)
            mass = tl.load(masses + at, mask=here, other=0.0)
            tops_here = tl.max(tl.reshape(largest, [WIDTH, PER_PART]), 1)
            wanted = tl.sum(mass * tl.exp((tops_here - peak) / temperature), 0)
            unknown = (top_k > 0) | (min_p > 0)
            wanted *= top_p
            looking = unknown | (top_p < 1)
            while looking:  # first, if need be, for the weight of all that is kept, then for a token inside of top_p
                pivot = -float("inf")
                if not unknown:
                    pivot = tl.load(logits + row.to(tl.int64) * V + tl.minimum(token, V - 1))
                    pivot = _adjusted(pivot, tl.minimum(token, V - 1), step, place, floats, ints, counts, V)
                before, drawn, other = _above(
                    pivot, kth, floor, peak, row, place, step, logits, floats, ints, counts, noisy, maxima, mine,
                    listed, V, groups,
                )  # fmt: skip
                outside = unknown | ((before >= wanted) & (drawn > -float("inf")))
                token = tl.where(outside, other, token)
                looking = outside & (top_p < 1)
                wanted = tl.where(unknown, before * top_p, wanted)
                unknown = unknown != unknown  # False
        token = tl.minimum(token, V - 1)
        raw = tl.load(logits + row.to(tl.int64) * V + token)
        tl.store(tokens + place, token)
        tl.store(logprobs + place, raw - highest - tl.log(total))
        if tl.load(whole + PENALIZED) != 0:
            to = counts + place.to(tl.int64) * V + token
            count = tl.load(to).to(tl.int32)
            tl.store(to, tl.where((count & 0x7FFF) < 0x7FFF, count + 1, count).to(tl.int16))
