"""Plain torch for every operation: the truth that other kernels are tested against. Slow on purpose, never wrong.

Heads are (query heads, key-value heads, head_dim); a row of `qkv` holds the queries, keys and values of one token, head
after head. The cache is one layer's pages of 16 tokens: keys [pages, kv_heads, head_dim, 16], values [pages, kv_heads,
16, head_dim], 16-bit. A sequence is a row (first row, rows, start, place) of int64: its tokens are `rows` rows of the
batch at positions start, start + 1 ..., and its page numbers stand in `pages` (int32) from `place` on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.format.groupwise import GroupwiseTensor

PAGE = 16  # tokens of a page
Heads = tuple[int, int, int]


def int4_matmul(x: Tensor, weight: GroupwiseTensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the dequantized weight [out, in], computed in float32, returned as x's dtype."""
    return F.linear(x.float(), weight.dequantize(), None if bias is None else bias.float()).to(x.dtype)


def dense_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a dense weight [out, in] in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich, arXiv 1910.07467: x / rms(x) * weight over the last dimension, in float32 inside."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """hidden += delta (in place, where there is one); the RMS norm of the sum [..., n]."""
    if delta is not None:
        hidden += delta
    return rms_norm(hidden, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[..., 2n] of gates and ups -> silu(gate) * up, [..., n] (Shazeer, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [len(positions), head_dim / 2], of positions int64 times frequencies float32."""
    angles = positions.float()[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) of x [..., heads, head_dim] by cos and sin [..., head_dim / 2];
    a head's two halves turn together, as Llama checkpoints on the Hub want."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def split_heads(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each a view [..., heads, head_dim]."""
    query, kv, dim = heads
    rows = qkv.view(*qkv.shape[:-1], query + 2 * kv, dim)
    return rows[..., :query, :], rows[..., query : query + kv, :], rows[..., query + kv :, :]


def rotate_and_store(
    qkv: Tensor,
    heads: Heads,
    rotary: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Norm (where `norms` for queries and keys [head_dim] are given) and rotate queries and keys in place, and write
    keys and values to the cache. qkv [rows, (query + 2 kv) * head_dim]; slots int64 [rows]: page * 16 + place.

    A page is cleared when its first place is written: nothing of its last holder stays. Infinities become the largest
    number of the cache's dtype; NaN stays.
    """
    q, k, v = split_heads(qkv, heads)
    for part, norm in ((q, norms[0]), (k, norms[1])):
        part.copy_(rotate(part if norm is None else rms_norm(part, norm, eps), *rotary))
    page, place = slots // PAGE, slots % PAGE
    limit = torch.finfo(keys.dtype).max
    keys[page[place == 0]] = 0
    values[page[place == 0]] = 0
    keys[page, :, :, place] = k.clamp(-limit, limit).to(keys.dtype)
    values[page, :, place] = v.clamp(-limit, limit).to(values.dtype)


def attention(
    qkv: Tensor, heads: Heads, sequences: Tensor, pages: Tensor, window: int | None, keys: Tensor, values: Tensor
) -> Tensor:
    """Causal attention of every row over its sequence's cached tokens -> [rows, query heads * head_dim].

    window: how many tokens back a query looks, itself among them; None for all.
    """
    query, kv, dim = heads
    out = qkv.new_empty(qkv.shape[0], query * dim)
    for first, rows, start, place in sequences.tolist():
        tokens = start + rows
        table = pages[place : place - (-tokens // PAGE)].long()
        k = keys[table].permute(0, 3, 1, 2).reshape(-1, kv, dim)[:tokens].to(qkv.dtype)
        v = values[table].permute(0, 2, 1, 3).reshape(-1, kv, dim)[:tokens].to(qkv.dtype)
        q = split_heads(qkv[first : first + rows], heads)[0]
        mask = causal_mask(rows, start, window, qkv.device)
        k, v = (t.transpose(0, 1)[None] for t in (k, v))
        y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
        out[first : first + rows] = y[0].transpose(0, 1).reshape(rows, -1)
    return out


def causal_mask(rows: int, start: int, window: int | None, device: torch.device) -> Tensor:
    """bool [rows, start + rows]: True where a query may look: at itself and before, `window` tokens at most."""
    at = torch.arange(start, start + rows, device=device)[:, None]
    key = torch.arange(start + rows, device=device)[None, :]
    return (key <= at) & (key > at - (window or start + rows))


def round_columns(
    wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, highest: int
) -> tuple[Tensor, Tensor]:
    """Integers 0..highest (as float32) of a block of weights [columns, out], the last column first, and what each
    loses: base minus what the integers stand for, both [columns, out].

    What is rounded of column c is wanted[c] plus feedback[c, other] times the error of each column after it; feedback
    [columns, columns]. scales, zeros float32 [groups, out]; groups int64 [columns] on the CPU: the group of each.
    """
    levels, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    of = groups.tolist()
    for own in range(len(wanted) - 1, -1, -1):
        after, scale, zero = slice(own + 1, None), scales[of[own]], zeros[of[own]]
        column = torch.addmv(wanted[own], errors[after].T, feedback[own, after])
        torch.div(column, scale, out=levels[own]).round_().add_(zero).clamp_(0, highest)
        torch.sub(zero, levels[own], out=errors[own]).mul_(scale).add_(base[own])
    return levels, errors
