"""Reference backend: plain torch on any device. It defines what every operation computes; tests compare others with it.

It is simple, not fast: INT4 weights stay 4 bits in memory, and each product dequantizes its whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.backends.base import Backend, Gemm, Heads, Pages, Rotary
from squawq.backends.layer_ops import Attention, Packed, RotateAndStore
from squawq.errors import ConfigError, KernelError
from squawq.format.groupwise import PER_WORD, from_gemm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class Int4Weight(Packed):
    """AWQ GEMM tensors as checkpoints have them: qweight int32 [in, out/8], scales [groups, out], qzeros int32
    [groups, out/8] or None where every zero is 8."""

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        self.shape = self.scales.shape[1], self.qweight.shape[0]

    def dense(self) -> Tensor:
        """float32 [out, in]."""
        return from_gemm(self.qweight, self.scales, self.qzeros).dequantize()


@dataclass
class Int8Weight(Packed):
    """weight int8 [out, in]; scales float32 [out]."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        self.shape = self.weight.shape[0], self.weight.shape[1]

    def dense(self) -> Tensor:
        """float32 [out, in]."""
        return self.weight.float() * self.scales[:, None]


@dataclass
class DenseWeight(Packed):
    """weight [out, in] in a floating-point dtype."""

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        self.shape = self.weight.shape[0], self.weight.shape[1]

    def dense(self) -> Tensor:
        return self.weight


class Reference(Backend):
    """See `Backend` for shapes and dtypes."""

    name = "reference"
    traceable = True

    @classmethod
    def declines(cls, device: torch.device) -> str | None:  # noqa: ARG003 (runs wherever torch does)
        return None

    def int4_declines(self, out: int, in_: int, group: int) -> str | None:
        return f"[{out}, {in_}] has no groups of {group} or is no multiple of 8" if in_ % group or out % 8 else None

    def int8_declines(self, out: int, in_: int, dtype: torch.dtype) -> str | None:  # noqa: ARG002
        return None if dtype.is_floating_point else f"the weight is {dtype}"

    def pack_int4(
        self,
        out: int,
        in_: int,
        group: int,  # noqa: ARG002 (the shape of the scales says it)
        parts: Iterable[Gemm],
        bias: Tensor | None = None,
    ) -> Packed:
        qweights, scales, qzeros = zip(*parts, strict=True)
        zeros = None
        if any(z is not None for z in qzeros):
            words = zip(qzeros, scales, strict=True)
            zeros = self._stack([symmetric_zeros(s) if z is None else z for z, s in words])
        found = Int4Weight(self._stack(qweights), self._stack(scales), zeros, bias)
        if found.shape != (out, in_):
            raise KernelError(f"int4 tensors are {list(found.shape)}; {[out, in_]} is needed")
        return found

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        return (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), 1)).to(self.device)

    def pack_int8(self, weight: Tensor) -> Packed:
        return Int8Weight(*round_int8(weight.to(self.device)))

    def pack_dense(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> Packed:
        weights = [part.to(self.device, torch.float32) for part in parts]
        return DenseWeight(torch.cat(weights), None if bias is None else bias.to(self.device))

    def part(self, weight: Packed, first: int, out: int) -> Packed:
        rows = slice(first, first + out)
        match weight:
            case Int4Weight(qweight, scales, qzeros, None):
                words = slice(first // PER_WORD, (first + out) // PER_WORD)
                return Int4Weight(qweight[:, words], scales[:, rows], None if qzeros is None else qzeros[:, words])
            case DenseWeight(dense, None):
                return DenseWeight(dense[rows])
        return super().part(weight, first, out)

    def page_shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys [kv_heads, head_dim, 16], values [kv_heads, 16, head_dim]."""
        return (kv_heads, head_dim, self.page_size), (kv_heads, self.page_size, head_dim)

    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """In float32 if `exact`, else in x's dtype."""
        if not isinstance(weight, Int4Weight | Int8Weight | DenseWeight):
            raise KernelError(f"the reference backend cannot read {type(weight).__name__}; it packs weights itself")
        if not x.dtype.is_floating_point or x.shape[-1] != weight.shape[1]:
            raise KernelError(f"activations {x.dtype} {tuple(x.shape)} do not fit a weight {list(weight.shape)}")
        dtype = torch.float32 if self.exact else x.dtype
        bias = None if weight.bias is None else weight.bias.to(dtype)
        return F.linear(x.to(dtype), weight.dense().to(dtype), bias).to(x.dtype)

    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            hidden += delta
        return rms_norm(hidden, weight, eps)

    def activation_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        """Shazeer, arXiv 2002.05202."""
        gate, up = gate_up.chunk(2, -1)
        return ACTIVATIONS[activation](gate) * up

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
        """Clears a page when its first slot is written, so that nothing of another sequence stays. Infinities become
        the largest number of the cache's dtype; NaN stays.
        """
        keys, values = pages
        q, k, v = split_heads(qkv, heads)
        cos, sin = map(operation.columns, rotary)
        for part, weight in ((q, operation.query_norm), (k, operation.key_norm)):

            def norm(x: Tensor, weight: Tensor | None = weight) -> Tensor:
                if weight is None:
                    return x
                return rms_norm(x.flatten(-2) if operation.whole else x, weight, eps).view(x.shape)

            if operation.rope_first:
                part.copy_(norm(rotate(part, cos, sin, operation.interleaved)))
            else:
                part.copy_(rotate(norm(part), cos, sin, operation.interleaved))
        page, place = slots // self.page_size, slots % self.page_size
        limit = torch.finfo(keys.dtype).max
        keys[page[place == 0]] = 0
        values[page[place == 0]] = 0
        keys[page, :, :, place] = k.clamp(-limit, limit).to(keys.dtype)
        values[page, :, place] = v.clamp(-limit, limit).to(values.dtype)

    def attention(
        self, qkv: Tensor, heads: Heads, operation: Attention, sequences: Tensor, tables: Tensor, pages: Pages
    ) -> Tensor:
        (query, kv, dim), (keys, values) = heads, pages
        out = qkv.new_empty(qkv.shape[0], query * dim)
        for first, rows, start, place in sequences.tolist():
            tokens = start + rows
            table = tables[place : place - (-tokens // self.page_size)].long()
            k = keys[table].permute(0, 3, 1, 2).reshape(-1, kv, dim)[:tokens].to(qkv.dtype)
            v = values[table].permute(0, 2, 1, 3).reshape(-1, kv, dim)[:tokens].to(qkv.dtype)
            q = split_heads(qkv[first : first + rows], heads)[0]
            mask = causal_mask(rows, start, operation.window, qkv.device)
            scale = operation.scale_of(dim)
            if operation.beta:
                at = torch.arange(start, tokens, device=qkv.device)
                q = q * (1 + operation.beta * torch.log1p((at // operation.original).float()))[:, None, None].to(
                    q.dtype
                )
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            if operation.cap:
                y = capped_attention(q, k, v, mask, scale, operation.cap)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            out[first : first + rows] = y[0].transpose(0, 1).reshape(rows, -1)
        return out

    def set_threads(self, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
            raise ConfigError(f"threads is {count!r}; it must be a whole number, 1 to 1024")
        torch.set_num_threads(count)

    def describe(self) -> dict[str, object]:
        if self.device.type == "cuda":
            return {"gpu": torch.cuda.get_device_name(self.device)}
        return {"threads": torch.get_num_threads(), "instructions": "torch"} if self.device.type == "cpu" else {}


def round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as int8, and its scales, float32 [out]."""
    rows = weight.float()
    scales = rows.abs().amax(1) / 127
    return (rows / scales.clamp(min=1e-30)[:, None]).round_().to(torch.int8), scales


def symmetric_zeros(scales: Tensor) -> Tensor:
    """qzeros whose every zero is 8, for scales [groups, out]."""
    words = scales.shape[0], scales.shape[1] // PER_WORD
    return torch.full(words, -0x77777778, dtype=torch.int32, device=scales.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich, arXiv 1910.07467: x / rms(x) * weight over the last dimension, in float32 inside."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Attention with soft-capped scores (Gemma 2, arXiv 2408.00118), for q [1, heads, rows, dim], k and v [1, kv heads,
    tokens, dim], mask bool [rows, tokens]."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * (scale / cap)).tanh() * cap
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, torch.float32).to(v.dtype) @ v


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) of x [..., heads, head_dim] by cos and sin [..., n / 2], where
    n <= head_dim (partial rotary: the rest stays). The two halves turn together, as in Llama checkpoints on the Hub;
    interleaved: neighbours, as in the paper."""
    half = cos.shape[-1]
    if not half:
        return x
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    both = first * cos - second * sin, second * cos + first * sin
    return torch.cat((torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1), rest), -1)


def split_heads(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each a view [..., heads, head_dim]."""
    query, kv, dim = heads
    rows = qkv.view(*qkv.shape[:-1], query + 2 * kv, dim)
    return rows[..., :query, :], rows[..., query : query + kv, :], rows[..., query + kv :, :]


def causal_mask(rows: int, start: int, window: int | None, device: torch.device) -> Tensor:
    """bool [rows, start + rows]: True where a query may look: at itself and before, `window` tokens at most."""
    at = torch.arange(start, start + rows, device=device)[:, None]
    key = torch.arange(start + rows, device=device)[None, :]
    return (key <= at) & (key > at - (window or start + rows))
