"""The decoder of Llama-like families as plain functions over a layer's weights, with a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.config import ModelConfig
from squawq.kernels import dispatch
from squawq.nn.linear import Linear
from squawq.nn.rope import cos_sin, inverse_frequencies, rotate


@dataclass
class Cache:
    """Keys and values of one layer, [batch, kv_heads, tokens, head_dim]; grows as tokens come."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append and return all keys and values so far."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), 2)
        self.values = values if self.values is None else torch.cat((self.values, values), 2)
        return self.keys, self.values

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its linears by name, its norms, and how far its attention looks back."""

    config: ModelConfig
    index: int
    linears: dict[str, Linear]
    norms: dict[str, Tensor]

    def __call__(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None = None) -> Tensor:
        """hidden [batch, tokens, hidden_size] -> the same shape; rotary is cos_sin of these tokens' positions."""
        hidden = hidden + self._attention(self._norm("input_layernorm", hidden), rotary, cache)
        x = self._norm("post_attention_layernorm", hidden)
        gate = F.silu(self.linears["mlp.gate_proj"](x))
        return hidden + self.linears["mlp.down_proj"](gate * self.linears["mlp.up_proj"](x))

    def dequantized(self) -> Layer:
        """The same layer with dense float32 weights, for whoever runs many tokens through it."""
        return replace(self, linears={name: linear.dequantized() for name, linear in self.linears.items()})

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x, self.norms[name], self.config.norm_eps)

    def _attention(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        batch, tokens, _ = x.shape

        def heads(name: str) -> Tensor:
            y: Tensor = self.linears[f"self_attn.{name}_proj"](x).view(batch, tokens, -1, self.config.head_dim)
            norm = self.norms.get(f"self_attn.{name}_norm")
            return (y if norm is None else dispatch.rms_norm(y, norm, self.config.norm_eps)).transpose(1, 2)

        query, key, value = rotate(heads("q"), *rotary), rotate(heads("k"), *rotary), heads("v")
        past = 0 if cache is None else cache.length
        if cache is not None:
            key, value = cache.extend(key, value)
        window = self.config.window(self.index)
        plain = past == 0 and tokens > 1 and (window is None or window >= tokens)
        mask = None if plain else _mask(tokens, past, window, x.device)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=plain, enable_gqa=True)
        return self.linears["self_attn.o_proj"](out.transpose(1, 2).reshape(batch, tokens, -1))


def _mask(tokens: int, past: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query may look: at itself and before, `window` tokens at most. None when all of it is allowed."""
    if tokens == 1 and (window is None or past < window):
        return None
    query = torch.arange(past, past + tokens, device=device)[:, None]
    key = torch.arange(past + tokens, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


@dataclass
class Decoder:
    """A whole model: embedding [vocab, hidden], layers, final norm [hidden] and head."""

    config: ModelConfig
    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Linear
    frequencies: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.frequencies = inverse_frequencies(self.config.rope, self.config.head_dim).to(self.embedding.device)

    def new_cache(self) -> list[Cache]:
        """An empty cache for every layer."""
        return [Cache() for _ in self.layers]

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: list[Cache] | None = None, last_only: bool = False) -> Tensor:
        """Logits float32 [batch, tokens, vocab] of ids int64 [batch, tokens] that follow what `cache` holds.

        `last_only` gives the last position's alone: [batch, 1, vocab].
        """
        past = 0 if cache is None else cache[0].length
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        rotary = cos_sin(self.frequencies, positions)
        hidden = self.embedding[ids].float()
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rotary, None if cache is None else cache[index])
        return self.head(dispatch.rms_norm(hidden[:, -1:] if last_only else hidden, self.norm, self.config.norm_eps))
