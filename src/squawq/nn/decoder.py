"""The decoder of Llama-like families: fused layers as plain functions, with attention passed in.

Hidden states run as rows of tokens. A layer adds what the layer before it left (`delta`) while it norms, so that
every residual addition is part of a norm. Attention is over the paged cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from squawq.backends import dispatch
from squawq.backends.cpu import library, operations
from squawq.backends.cpu.packed import Packed
from squawq.config import ModelConfig
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


@dataclass
class Decoder:
    """A whole model: embedding [vocab, hidden], layers, final norm [hidden] and head."""

    config: ModelConfig
    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Linear
    frequencies: Tensor = field(init=False)
    _bound: tuple[Cache | None, operations.LayerStack | None] = field(init=False, default=(None, None))

    def __post_init__(self) -> None:
        self.frequencies = inverse_frequencies(self.config.rope, self.config.head_dim).to(self.norm.device)

    def native(self, cache: Cache) -> bool:
        """Whether all layers run on the native kernels, in one call over this cache."""
        if self._bound[0] is not cache:
            self._bound = cache, layer_stack(self.layers, cache)
        return self._bound[1] is not None

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: Cache) -> Tensor:
        """Run the batch's tokens, write their keys and values to `cache`; logits float32 [outputs, vocab]."""
        hidden = self.embedding[batch.ids.to(self.embedding.device)].to(self.norm.device, torch.float32)
        rotary = dispatch.rotary(batch.positions, self.frequencies)
        if self.native(cache) and (stack := self._bound[1]) is not None:
            stack(hidden, rotary, batch.slots, batch.sequences, batch.pages)
        else:
            self._run(hidden, rotary, batch, cache)
        if not len(batch.outputs):
            return hidden.new_empty(0, self.config.vocab_size)
        rows = hidden if len(batch.outputs) == len(hidden) else hidden[batch.outputs]
        return self.head(dispatch.add_rms_norm(rows, None, self.norm, self.config.norm_eps))

    def _run(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], batch: Batch, cache: Cache) -> None:
        """The layers one operation at a time; `layer_stack` does the same in one call."""
        attend = partial(_paged_attention, batch, cache, rotary)
        delta: Tensor | None = None
        for layer in self.layers:
            delta = layer(hidden, delta, attend)
        if delta is not None:
            hidden += delta


def layer_stack(layers: Sequence[Layer], cache: Cache) -> operations.LayerStack | None:
    """The layers over this cache as one native call; None where the native kernels do not take all of it."""
    if not layers or cache.layer(0)[0].device.type != "cpu" or library.load() is None:
        return None
    config = layers[0].config
    query, kv, dim = config.heads
    widths = (config.hidden_size, config.intermediate_size, dim)
    if any(width % library.LANES for width in widths) or query > kv * operations.MOST_SHARED_HEADS:
        return None
    parts = []
    for layer in layers:
        linears = [layer.linears[name] for name in (QKV, OUT, GATE_UP, DOWN)]
        packed = [linear.weight for linear in linears if isinstance(linear.weight, Packed) and linear.bias is None]
        if len(packed) < len(linears):
            return None
        norms = (layer.norms["input_layernorm"], layer.norms["post_attention_layernorm"], *layer.head_norms)
        qkv, out, gate_up, down = packed
        keys_values = cache.layer(layer.index)
        parts.append(operations.LayerParts(norms, (qkv, out, gate_up, down), keys_values, config.window(layer.index)))
    return operations.LayerStack(parts, config.heads, config.intermediate_size, config.norm_eps)


def _paged_attention(batch: Batch, cache: Cache, rotary: tuple[Tensor, Tensor], layer: Layer, qkv: Tensor) -> Tensor:
    config, heads = layer.config, layer.config.heads
    keys, values = cache.layer(layer.index)
    dispatch.rotate_and_store(qkv, heads, rotary, layer.head_norms, config.norm_eps, batch.slots, keys, values)
    window = config.window(layer.index)
    return dispatch.attention(qkv, heads, batch.sequences, batch.pages, window, keys, values)
