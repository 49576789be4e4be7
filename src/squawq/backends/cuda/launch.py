"""Launches the Triton kernels on torch tensors: checks nothing, chooses tiles.

Tiles depend on the number of rows, the split of the inputs on the weight alone: so a row's bits are the same beside any
others (measured on an H200: tiles of 8 to 128 rows give equal bits, with mma and wgmma instructions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from squawq.backends.cuda import attention, dense, elementwise, exchange, int4, rounding, sampling, tiles
from squawq.backends.layer_ops import Attention, Packed, RotateAndStore


@dataclass
class DenseWeight(Packed):
    """weight [out, in] in 16 bits, or int8 with scales float32 [out]."""

    weight: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        self.shape = self.weight.shape[0], self.weight.shape[1]


Weight = int4.Int4Weight | DenseWeight


@dataclass(frozen=True)
class Awaited:
    """Arrivals from other GPUs: int32 [rows] counters go up to `count`, unless `ended` is set: see CudaGroup."""

    counters: Tensor
    count: int
    ended: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sums:
    """A product as partial sums, float32 [splits, rows, out], to be added in order, and then the bias float32 [out].

    awaited: What to wait for first.
    """

    parts: Tensor
    bias: Tensor | None = None
    awaited: Awaited | None = None


def splits(weight: Weight) -> int:
    """Into how many parts the inputs are cut, so that there are enough programs: by the weight's shape alone."""
    return tiles.split_count(weight.shape[0], _blocks(weight))


def _blocks(weight: Weight) -> int:
    return weight.words.shape[0] if isinstance(weight, int4.Int4Weight) else -(-weight.shape[1] // 64)


def pdl(dependent: bool) -> dict[str, Any]:
    """Programmatic dependent launch: a kernel starts while the one before it ends."""
    return {"launch_pdl": True} if dependent else {}


def matmul(x: Tensor, weight: Weight, out: Tensor, dependent: bool = False) -> Sums:
    """x [rows, in] @ weight.T into out, float32 [splits(weight), rows, out]; for up to some hundred rows."""
    rows, (n, k) = x.shape[0], weight.shape
    blocks, count = _blocks(weight), out.shape[0]
    split = triton.cdiv(blocks, count)
    if isinstance(weight, int4.Int4Weight):
        tile = tiles.tile(rows, n, x.device)
        grid = (triton.cdiv(n, tile.outputs), count, triton.cdiv(rows, tile.tokens))
        int4.matmul_kernel[grid](
            x, weight.words, weight.grids, out, rows, n, k, blocks, split, weight.group, k % int4.BLOCK != 0,
            tile.tokens, tile.outputs, tile.stages, dependent, int4.INTERPRETED,
            num_warps=tile.warps, num_stages=tile.stages, **pdl(dependent),
        )  # fmt: skip
    else:
        scales, tokens = weight.scales, min(64, max(8, triton.next_power_of_2(rows)))
        grid = (triton.cdiv(n, 64), count, triton.cdiv(rows, tokens))
        dense.matmul_kernel[grid](
            x, weight.weight, weight.weight if scales is None else scales, out, rows, n, k, split, scales is not None,
            tokens, 64, 64, 4, dependent, int4.INTERPRETED, num_warps=4, num_stages=4, **pdl(dependent),
        )  # fmt: skip
    return Sums(out, weight.bias)


def dequantize(weight: int4.Int4Weight, out: Tensor) -> None:
    """The weight into out [out, in], in the dtype of activations."""
    n, k = weight.shape
    int4.dequantize_kernel[(triton.cdiv(n, 32), weight.words.shape[0])](
        weight.words, weight.grids, out, n, k, weight.group, 32, int4.TRITON[weight.dtype]
    )


def add_norm(
    sums: Sums | None, hidden: Tensor, weight: Tensor | None, eps: float, out: Tensor, residual: bool = True,
    dependent: bool = False,
) -> None:  # fmt: skip
    """hidden [rows, n] += sums; out [rows, n] = its RMS norm times weight, or without a weight hidden itself.

    residual False: the norm of sums alone.
    """
    rows, n = out.shape
    parts, bias, awaited = (hidden, None, None) if sums is None else (sums.parts, sums.bias, sums.awaited)
    width, none = triton.next_power_of_2(n), hidden
    counters, count, ended = (
        (none, 0, (none, none)) if awaited is None else (awaited.counters, awaited.count, awaited.ended)
    )
    elementwise.add_norm_kernel[(rows,)](
        parts, none if bias is None else bias, hidden, none if weight is None else weight, out, counters, count, *ended,
        rows, n, eps, awaited is not None, 0 if sums is None else parts.shape[0], bias is not None, residual,
        weight is not None, torch.finfo(out.dtype).max, width, dependent,
        num_warps=min(32, max(1, width // 128)), **pdl(dependent),
    )  # fmt: skip


def rotate_and_store(
    sums: Sums, heads: tuple[int, int, int], operation: RotateAndStore, rotary: tuple[Tensor, Tensor], eps: float,
    slots: Tensor, queries: Tensor, pages: tuple[Tensor, Tensor], each: int, scales: Tensor | None = None,
    dependent: bool = False,
) -> None:  # fmt: skip
    """Queries, rotated, into `queries` [rows, heads * dim] of any stride; keys and values to their slots.

    Args:
        each: Heads of a program; another number may add a head's norm in another order.
        scales: Room for float32 [rows, 2], if the operation's norms are of all heads together.
    """
    (query, kv, dim), (keys, values) = heads, pages
    (splits, rows, width), none = sums.parts.shape, rotary[0]
    query_norm, key_norm = operation.query_norm, operation.key_norm
    cos, sin = map(operation.columns, rotary)
    biased, bias = sums.bias is not None, none if sums.bias is None else sums.bias
    if operation.whole:
        assert scales is not None
        elementwise.head_scales_kernel[(rows, 2)](
            sums.parts, bias, scales, rows, eps, splits, biased, query * dim, kv * dim, width, 1024, dependent,
            num_warps=4, **pdl(dependent),
        )  # fmt: skip
    elementwise.rotate_and_store_kernel[(rows, triton.cdiv(query + 2 * kv, each))](
        sums.parts, bias, none if query_norm is None else query_norm, none if key_norm is None else key_norm,
        none if scales is None else scales, cos, sin, cos.stride(0), slots, queries, queries.stride(0), keys, values,
        rows, eps, splits, biased, query_norm is not None, operation.whole, operation.rope_first, operation.interleaved,
        cos.shape[1], query, kv, dim, triton.next_power_of_2(dim // 2), keys.shape[2], torch.finfo(keys.dtype).max,
        each, dependent, num_warps=min(4, each), **pdl(dependent),
    )  # fmt: skip


def activation_mul(sums: Sums, activation: str, out: Tensor, dependent: bool = False) -> None:
    """activation(gate) * up, for gate and up side by side, into out [rows, n]."""
    rows, n = out.shape
    width = min(1024, triton.next_power_of_2(n))
    elementwise.activation_mul_kernel[(rows, triton.cdiv(n, width))](
        sums.parts, sums.parts if sums.bias is None else sums.bias, out, rows, n, sums.parts.shape[0],
        sums.bias is not None, activation, torch.finfo(out.dtype).max, width, dependent,
        num_warps=4, **pdl(dependent),
    )  # fmt: skip


@dataclass
class DecodeSpace:
    """Where decode attention keeps the parts of each sequence: float32 [rows, heads, CHUNKS, head_dim], [..., 2]."""

    sums: Tensor
    stats: Tensor


def decode_space(rows: int, heads: tuple[int, int, int], device: torch.device) -> DecodeSpace:
    shape = (rows, heads[0], tiles.CHUNKS)
    return DecodeSpace(
        torch.empty(*shape, heads[2], device=device, dtype=torch.float32),
        torch.empty(*shape, 2, device=device, dtype=torch.float32),
    )


def decode_attention(
    queries: Tensor, heads: tuple[int, int, int], operation: Attention, pages: tuple[Tensor, Tensor], tables: Tensor,
    positions: Tensor, out: Tensor, space: DecodeSpace, dependent: bool = False,
) -> None:  # fmt: skip
    """One query of each sequence. tables int32 [rows, pages]; positions int64 [rows], -1 for a row of padding."""
    (query, kv, dim), (keys, values), rows = heads, pages, queries.shape[0]
    window = operation.window
    programs = 2 if int4.INTERPRETED else 1024
    lanes = max(1, min(tiles.CHUNKS, programs // (rows * kv)))
    block = 64 if dim <= 128 else 32
    width, sharing = triton.next_power_of_2(dim), max(16, triton.next_power_of_2(query // kv))
    attention.decode_kernel[(rows, kv, lanes)](
        queries, keys, values, tables, positions, space.sums, space.stats, *_scoring(operation, dim),
        tables.stride(0), window or 0, query, kv, sharing, dim, width, keys.shape[2], block, tiles.CHUNKS,
        window is not None, bool(operation.cap), bool(operation.beta), dependent, num_warps=4, num_stages=2,
        **pdl(dependent),
    )  # fmt: skip
    attention.combine_kernel[(rows, query)](
        space.sums, space.stats, positions, out, window or 0, query, dim, width, block, tiles.CHUNKS,
        window is not None, dependent, num_warps=1, **pdl(dependent),
    )  # fmt: skip


def _scoring(operation: Attention, dim: int) -> tuple[float, float, float, int]:
    """The kernels' scale, cap, beta and original: weights are powers of 2."""
    base = math.log2(math.e)
    return operation.scale_of(dim) * base, operation.cap * base, operation.beta, operation.original


def prefill_attention(
    queries: Tensor, heads: tuple[int, int, int], operation: Attention, pages: tuple[Tensor, Tensor], blocks: Tensor,
    tables: Tensor, out: Tensor, size: int,
) -> None:  # fmt: skip
    """Queries [rows, heads * dim] of any stride, in blocks of `size` at most: int32 [blocks, 4], see prefill_kernel."""
    (query, kv, dim), (keys, values), window = heads, pages, operation.window
    attention.prefill_kernel[(blocks.shape[0], query)](
        queries, keys, values, blocks, tables, out, queries.stride(0), *_scoring(operation, dim), window or 0,
        query, kv, dim, triton.next_power_of_2(dim), keys.shape[2], size, 64 if dim <= 128 else 32,
        window is not None, bool(operation.cap), bool(operation.beta), num_warps=4 if size <= 64 else 8, num_stages=2,
    )  # fmt: skip


def embed(
    ids: Tensor, positions: Tensor, slots: Tensor, sampled: Tensor, embedding: Tensor, first: int, frequencies: Tensor,
    scale: float, hidden: Tensor, rotary: tuple[Tensor, Tensor], tables: Tensor, page: int,
) -> None:  # fmt: skip
    """hidden float32 [rows, n], cos and sin of the positions, and the page of each slot into its row's table.

    Where an id is below 0, the row's token is in `sampled`, int32 [rows]. first: of the tokens that `embedding` has;
    others give zeros.
    """
    n, half = hidden.shape[1], frequencies.shape[1]
    elementwise.embed_kernel[(len(ids),)](
        ids, positions, slots, sampled, embedding, first, len(embedding), frequencies, scale, hidden, *rotary, tables,
        tables.stride(0), n, half, page, triton.next_power_of_2(half), triton.next_power_of_2(n), num_warps=8,
    )  # fmt: skip


def soft_cap(logits: Tensor, cap: float, dependent: bool = False) -> None:
    """logits float32 [rows, vocab] = cap * tanh(logits / cap)."""
    rows, n = logits.shape
    width = min(4096, triton.next_power_of_2(n))
    elementwise.soft_cap_kernel[(rows, triton.cdiv(n, width))](
        logits, n, cap, width, dependent, num_warps=8, **pdl(dependent)
    )


PUSHED = 1024  # numbers that a program writes


def pushes(n: int) -> int:
    """How often a row's counter goes up when n numbers are pushed."""
    return int(triton.cdiv(n, PUSHED))


def push(
    sums: Sums, ranks: tuple[Tensor, Tensor], targets: int, place: int, stride: int, arrivals: int,
    dependent: bool = False,
) -> None:  # fmt: skip
    """Write sums [rows, n] into the buffers of the first `targets` ranks.

    Args:
        ranks: int64 [size] addresses of the buffers (float32) and of the counters (int32) of all ranks.
        place, stride: Of the first row in a buffer, and from one row to the next.
        arrivals: The first row's counter.
    """
    _, rows, n = sums.parts.shape
    width = min(PUSHED, triton.next_power_of_2(n))
    exchange.push_kernel[(rows, pushes(n))](
        sums.parts, sums.parts if sums.bias is None else sums.bias, *ranks, rows, n, place, stride, arrivals, targets,
        sums.parts.shape[0], sums.bias is not None, width, dependent, num_warps=4, **pdl(dependent),
    )  # fmt: skip


def await_rows(awaited: Awaited, dependent: bool = False) -> None:
    """Wait for all rows."""
    exchange.await_kernel[(len(awaited.counters),)](
        awaited.counters, awaited.count, *awaited.ended, dependent, num_warps=1, **pdl(dependent)
    )


@dataclass
class SamplingSpace:
    """Parameters of sequences, one a place, and what the sampling kernels keep of a row: see sampling.py for shapes.

    results int32 [2, places]: tokens, and the bits of log probabilities.
    """

    vocab: int
    floats: Tensor
    ints: Tensor
    counts: Tensor
    results: Tensor
    parts: tuple[Tensor, ...]  # tops, sums, masses, bests, ids
    noisy: Tensor
    maxima: Tensor
    chosen: Tensor


def sampling_space(rows: int, vocab: int, device: torch.device) -> SamplingSpace:
    def zeros(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=kind, device=device)

    parts = triton.cdiv(vocab, sampling.PART)
    return SamplingSpace(
        vocab,
        zeros(rows, sampling.FLOATS.value),
        zeros(rows, sampling.INTS.value, kind=torch.int32),
        zeros(rows, vocab, kind=torch.int16),
        zeros(2, rows, kind=torch.int32),
        (*(zeros(rows, parts) for _ in range(4)), zeros(rows, parts, kind=torch.int32)),
        zeros(rows, vocab),
        zeros(rows, parts * sampling.PART // sampling.GROUP.value),
        zeros(rows, sampling.LISTED.value, kind=torch.int32),
    )


def sample(logits: Tensor, places: Tensor, positions: Tensor, space: SamplingSpace, dependent: bool = False) -> None:
    """A token for each row of float32 logits [rows, vocab], into the place of its sequence in space.results.

    places int32 [rows]; positions int64 [rows] of the tokens that the logits follow, -1 for a row of padding.
    """
    rows, parts = len(logits), space.parts[0].shape[1]
    tables = space.floats, space.ints, space.counts
    sampling.score_kernel[(rows, parts)](
        logits, places, positions, *tables, *space.parts, space.noisy, space.maxima, space.vocab, parts, sampling.PART,
        dependent, num_warps=8, **pdl(dependent),
    )  # fmt: skip
    tokens, logprobs = space.results[0], space.results[1].view(torch.float32)
    sampling.choose_kernel[(rows,)](
        logits, places, positions, *tables, *space.parts, space.noisy, space.maxima, space.chosen, tokens, logprobs,
        space.vocab, parts, sampling.PART // sampling.GROUP.value, triton.next_power_of_2(parts),
        dependent, num_warps=16, **pdl(dependent),
    )  # fmt: skip


def round_columns(
    wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """See `Backend.round_columns`; up to rounding.MAX_COLUMNS columns."""
    wanted, base, feedback = wanted.contiguous(), base.contiguous(), feedback.contiguous()
    levels, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    columns, out = wanted.shape
    rounding.round_columns_kernel[(triton.cdiv(out, rounding.ROWS),)](
        wanted, base, feedback, scales.contiguous(), zeros.contiguous(), groups.to(wanted.device), levels, errors,
        columns, out, float(top), rounding.MAX_COLUMNS, rounding.ROWS, num_warps=4,
    )  # fmt: skip
    return levels, errors
