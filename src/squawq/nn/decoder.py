"""The decoder of Llama-like families: fused layers as plain functions, with attention passed in.

Hidden states run as rows of tokens. A layer adds what the layer before it left (`delta`) while it norms, so that
every residual addition is part of a norm. Attention is over the paged cache (`Decoder`) or over the rows themselves
(`causal_attention`, for whoever runs whole windows through one layer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.config import ModelConfig
from squawq.kernels import dispatch, reference
from squawq.nn.cache import Batch, Cache
from squawq.nn.linear import Linear
from squawq.nn.rope import inverse_frequencies

QKV, OUT, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its four fused linears and its norms by name."""

    config: ModelConfig
    index: int
    linears: dict[str, Linear]
    norms: dict[str, Tensor]

    def __call__(self, hidden: Tensor, delta: Tensor | None, attend: Callable[[Layer, Tensor], Tensor]) -> Tensor:
        """hidden [..., hidden_size] += delta, in place, and then what attention gives; returns the MLP's output, which
        is still to be added. attend: queries, keys and values [..., (query + 2 kv) * head_dim] to attention's output.
        """
        eps = self.config.norm_eps
        x = dispatch.add_rms_norm(hidden, delta, self.norms["input_layernorm"], eps)
        y = self.linears[OUT](attend(self, self.linears[QKV](x)))
        x = dispatch.add_rms_norm(hidden, y, self.norms["post_attention_layernorm"], eps)
        return self.linears[DOWN](dispatch.silu_mul(self.linears[GATE_UP](x)))

    @property
    def head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """Norms of queries and keys, in families that have them."""
        return self.norms.get("self_attn.q_norm"), self.norms.get("self_attn.k_norm")


def causal_attention(layer: Layer, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Attention of windows over themselves, in qkv's dtype: [batch, tokens, ...] -> [batch, tokens, query * head_dim].

    rotary: cos and sin of the windows' positions, [tokens, head_dim / 2].
    """
    config = layer.config
    q, k, v = reference.split_heads(qkv, config.heads)
    query_norm, key_norm = layer.head_norms
    if query_norm is not None and key_norm is not None:
        q, k = reference.rms_norm(q, query_norm, config.norm_eps), reference.rms_norm(k, key_norm, config.norm_eps)
    q, k, v = (t.transpose(1, 2) for t in (reference.rotate(q, *rotary), reference.rotate(k, *rotary), v))
    window, tokens = config.window(layer.index), qkv.shape[1]
    mask = None if window is None or window >= tokens else reference.causal_mask(tokens, 0, window, qkv.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


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
        self.frequencies = inverse_frequencies(self.config.rope, self.config.head_dim).to(self.norm.device)

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: Cache) -> Tensor:
        """Run the batch's tokens, write their keys and values to `cache`; logits float32 [outputs, vocab]."""
        hidden = self.embedding[batch.ids.to(self.embedding.device)].to(self.norm.device, torch.float32)
        attend = partial(_paged_attention, batch, cache, dispatch.rotary(batch.positions, self.frequencies))
        delta: Tensor | None = None
        for layer in self.layers:
            delta = layer(hidden, delta, attend)
        if delta is not None:
            hidden += delta
        if not len(batch.outputs):
            return hidden.new_empty(0, self.config.vocab_size)
        rows = hidden if len(batch.outputs) == len(hidden) else hidden[batch.outputs]
        return self.head(dispatch.add_rms_norm(rows, None, self.norm, self.config.norm_eps))


def _paged_attention(batch: Batch, cache: Cache, rotary: tuple[Tensor, Tensor], layer: Layer, qkv: Tensor) -> Tensor:
    config, heads = layer.config, layer.config.heads
    keys, values = cache.layer(layer.index)
    dispatch.rotate_and_store(qkv, heads, rotary, layer.head_norms, config.norm_eps, batch.slots, keys, values)
    window = config.window(layer.index)
    return dispatch.attention(qkv, heads, batch.sequences, batch.pages, window, keys, values)
