"""A small backend with layouts of its own: float32 pages of 8 tokens, dense weights [in, out]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from squawq.backends.base import Backend, Gemm, Heads, Pages, Rotary
from squawq.backends.layer_ops import Attention, Packed, RotateAndStore
from squawq.format.groupwise import from_gemm


class Transposed(Packed):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.weight, self.bias = weight.float().T.contiguous(), torch.zeros(weight.shape[0]) if bias is None else bias


class PlainBackend(Backend):
    name, page_size, cache_dtype = "plain", 8, torch.float32

    @classmethod
    def declines(cls, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it is for tests on the CPU"

    def pack_int4(self, out: int, in_: int, group: int, parts: Iterable[Gemm], bias: Tensor | None = None) -> Packed:
        return Transposed(torch.cat([from_gemm(*part).dequantize() for part in parts]), bias)

    def pack_dense(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> Packed:
        return Transposed(torch.cat([part.float() for part in parts]), bias)

    def page_shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (8, kv_heads, head_dim), (8, kv_heads, head_dim)

    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        assert isinstance(weight, Transposed)
        return x @ weight.weight + weight.bias

    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            hidden += delta
        return hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate_and_store(
        self,
        qkv: Tensor,
        heads: Heads,
        operation: RotateAndStore,
        rotary: Rotary,
        eps: float,
        slots: Tensor,
        pages: Pages,
    ) -> None:
        (query, kv, dim), (keys, values) = heads, pages
        rows = qkv.view(len(qkv), -1, dim)
        cos, sin = (operation.columns(part)[:, None] for part in rotary)
        norms = operation.query_norm, operation.key_norm
        for part, norm in zip((rows[:, :query], rows[:, query : query + kv]), norms, strict=True):
            x = part if norm is None else self.add_rms_norm(part, None, norm, eps)
            first, second = x.chunk(2, -1)
            part.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
        keys[slots // 8, slots % 8], values[slots // 8, slots % 8] = rows[:, query : query + kv], rows[:, query + kv :]

    def attention(
        self, qkv: Tensor, heads: Heads, operation: Attention, sequences: Tensor, tables: Tensor, pages: Pages
    ) -> Tensor:
        (query, kv, dim), (keys, values) = heads, pages
        out = qkv.new_zeros(len(qkv), query, dim)
        for first, rows, start, place in sequences.tolist():
            for row in range(rows):
                end = start + row + 1
                seen = slice(max(0, end - (operation.window or end)), end)
                table = tables[place : place - (-end // 8)].long()
                k, v = (part[table].flatten(0, 1)[seen].repeat_interleave(query // kv, 1) for part in (keys, values))
                q = qkv[first + row].view(-1, dim)[:query]
                weights = (torch.einsum("hd,thd->ht", q, k) / dim**0.5).softmax(-1)
                out[first + row] = torch.einsum("ht,thd->hd", weights, v)
        return out.flatten(1)

    def activation_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate * gate.sigmoid() * up
