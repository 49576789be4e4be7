"""transformers' attention on a paged KV cache: what it must know of a model's layers, and the function behind it.

transformers calls attention through an interface (`ALL_ATTENTION_FUNCTIONS`), to which functions can be added by name.
One step runs the tokens of all sequences as one row, without masks: each layer writes its keys and values to the cache,
and every token attends over its own sequence's pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from squawq.backends import REFERENCE, backend_for
from squawq.backends.base import PAGE, Backend, Batch, Heads, Pages, Rotary
from squawq.backends.layer_ops import Attention, RotateAndStore
from squawq.errors import ConfigError
from squawq.layerwise.packed_model import PackedModel
from squawq.nn.cache import zeros

ATTENTION, PROBE = "squawq", "squawq_probe"  # names in transformers' tables of attention functions
HOLDER = "squawq_attention"  # attribute of a model's config: the object whose `attend` the functions call
STORE = RotateAndStore(0, pairs=0)  # transformers has rotated queries and keys
FARTHEST = 2**20  # tokens after which a window is not looked for


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer's attention is.

    Attributes:
        heads: Query heads, key-value heads.
        dims: Of queries and keys, of values.
        window: Sliding window in tokens; None for full attention.
        sinks: Each head has a further score in its softmax, without a value (gpt-oss).
        source: The layer whose keys and values it attends over: itself, or an earlier one that it shares them with.
    """

    heads: tuple[int, int]
    dims: tuple[int, int]
    window: int | None
    sinks: bool
    source: int

    @property
    def values(self) -> int:
        """Numbers of a token in the cache of `source`: keys, and values as wide as they are."""
        return 2 * self.heads[1] * max(self.dims)


class Unpaged(Exception):  # noqa: N818 (no error: the model runs otherwise)
    """Why a model's past is more than keys and values in pages."""


@cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        holder = getattr(module.config, HOLDER)
        return holder.attend(module.layer_idx, query, key, value, attention_mask, **kwargs), None

    def mask(*, config: Any, **kwargs: Any) -> Tensor:
        found: Tensor = getattr(config, HOLDER).mask(**kwargs)
        return found

    for name in (ATTENTION, PROBE):
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, mask)  # of ATTENTION there is none, so transformers makes no mask


def attention_layers(model: PackedModel, cache_name: str, positions: int) -> list[AttentionLayer]:
    """Each layer's attention, found by running one token.

    Args:
        model: The model.
        cache_name: The name of transformers' cache in its result.
        positions: The model's context length.

    Raises:
        Unpaged: A layer keeps more than keys and values, or attends in a way that pages do not serve.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    class Cache(DynamicCache):  # type: ignore[misc]
        def get_seq_length(self, layer_idx: int = 0) -> int:
            if probe.inside:
                raise Unpaged(f"layer {layer_idx} takes positions from its cache")
            return int(super().get_seq_length(layer_idx))

    _register()
    probe = _Probe(min(positions, FARTHEST))
    usual = model.config._attn_implementation
    model.config._attn_implementation = PROBE
    setattr(model.config, HOLDER, probe)
    hooks = [hook for layer in model.layers for hook in probe.around(layer)]
    try:
        one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        made = Cache(config=model.config)
        found = model(one, one[0], use_cache=True, **{cache_name: made})[cache_name]
    finally:
        for hook in hooks:
            hook.remove()
        model.config._attn_implementation = usual
        delattr(model.config, HOLDER)
    if found is not made:
        raise Unpaged(f"its cache is a {type(found).__name__}")
    for index, layer in enumerate(found.layers):
        shares = index in probe.layers and probe.layers[index].source != index
        if not shares and type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Unpaged(f"the state of layer {index} is more than keys and values")
        if index not in probe.layers:
            raise Unpaged(f"the attention of layer {index} has an implementation of its own")
    return [layer for _, layer in sorted(probe.layers.items())]


class _Probe:
    """Records how attention is called, and whether a layer runs. Masks are known by the functions they are made of."""

    def __init__(self, positions: int) -> None:
        self.layers: dict[int, AttentionLayer] = {}
        self.inside = False
        self._positions = positions
        self._masks: list[tuple[Tensor, Callable[..., Tensor]]] = []
        self._keys: list[tuple[Tensor, int]] = []

    def around(self, layer: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        def enter(*_: object) -> None:
            self.inside = True

        def leave(*_: object) -> None:
            self.inside = False

        return layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)

    def mask(self, *, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **_: Any) -> Tensor:
        made = torch.zeros(1, 1, q_length, kv_length)
        self._masks.append((made, mask_function))
        return made

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        if layer in self.layers:
            raise Unpaged(f"layer {layer} attends twice")
        function = next((function for made, function in self._masks if made is mask), None)
        if function is None:
            raise Unpaged(f"the mask of layer {layer} is its own")
        self.layers[layer] = AttentionLayer(
            heads=(query.shape[1], key.shape[1]),
            dims=(query.shape[3], value.shape[3]),
            window=_window(function, self._positions, query.device),
            sinks=kwargs.get("s_aux") is not None,
            source=next((source for made, source in self._keys if made is key), layer),
        )
        self._keys.append((key, layer))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def _window(mask: Callable[..., Tensor], positions: int, device: torch.device) -> int | None:
    """The window of a causal mask, a function of batch, head, query and key index; None where all is seen."""

    def first(at: int) -> int:
        """The first token that the one at this position sees."""
        keys, zero = torch.arange(at + 2, device=device), torch.zeros((), dtype=torch.int64, device=device)
        seen = mask(zero, zero, torch.full_like(keys, at), keys)
        if seen[-1]:
            raise ConfigError("its attention sees later tokens, so it cannot generate text")
        seen = seen[:-1]
        start = int(seen.int().argmax())
        if not seen[start:].all():
            raise Unpaged("its attention mask has gaps")
        return start

    last = positions - 1
    window = last - first(last) + 1
    if any(first(at) != max(0, at - window + 1) for at in (max(0, last - 1), last // 2, last // 3)):
        raise Unpaged("its attention mask is no sliding window")  # but chunks, as Llama 4's
    return window if window < positions else None


class PagedAttention:
    """A paged KV cache, and the attention of the steps that run on it.

    Memory: `token_bytes` for each token; on the CPU only of the pages that were written.
    """

    def __init__(self, model: PackedModel, layers: Sequence[AttentionLayer], pages: int, backend: Backend) -> None:
        plain = backend_for(backend.device, REFERENCE)  # whose pages `_attend_with_sinks` reads
        self._layers = layers
        self._backends = [plain if layer.sinks else backend for layer in layers]
        self._caches = {
            index: _pages(layer, pages, own)
            for index, (layer, own) in enumerate(zip(layers, self._backends, strict=True))
            if layer.source == index
        }
        self._batch: Batch
        self._rotary: Rotary
        model.config._attn_implementation = ATTENTION
        setattr(model.config, HOLDER, self)

    @staticmethod
    def token_bytes(layers: Sequence[AttentionLayer], backend: Backend) -> int:
        """Bytes of one token's keys and values in all layers."""
        plain = backend_for(backend.device, REFERENCE).cache_dtype
        own = [layer for index, layer in enumerate(layers) if layer.source == index]
        return sum(layer.values * (plain if layer.sinks else backend.cache_dtype).itemsize for layer in own)

    def begin(self, batch: Batch) -> None:
        """Set the tokens of the next step."""
        self._batch = batch
        self._rotary = (torch.empty(len(batch.ids), 0, device=batch.ids.device),) * 2

    def attend(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """A layer's attention, as transformers calls it.

        Args:
            index: The layer.
            query: [1, query heads, tokens, key dim].
            key: [1, key-value heads, tokens, key dim].
            value: [1, key-value heads, tokens, value dim].
            scaling: Of scores; None: 1 / sqrt(key dim).
            softcap: Scores become softcap * tanh(score / softcap); None: they stay.
            s_aux: [query heads], further scores in each softmax, without values (attention sinks).

        Returns:
            [1, tokens, query heads, value dim].
        """
        layer, backend, batch = self._layers[index], self._backends[index], self._batch
        cached = self._caches[layer.source]  # where a layer shares keys and values, the same are written again
        dim, scale = max(layer.dims), layer.dims[0] ** -0.5 if scaling is None else scaling
        parts = (F.pad(part[0].transpose(0, 1), (0, dim - part.shape[-1])) for part in (query, key, value))
        qkv, heads = torch.cat(list(parts), 1).flatten(1), (*layer.heads, dim)
        backend.rotate_and_store(qkv, heads, STORE, self._rotary, 0.0, batch.slots, cached)
        attention = Attention(index, layer.window, scale, softcap or 0.0)
        given = qkv, heads, attention, batch.sequences, batch.pages, cached
        found = backend.attention(*given) if s_aux is None else _attend_with_sinks(*given, s_aux)
        return found.view(1, -1, layer.heads[0], dim)[..., : layer.dims[1]]


def _pages(layer: AttentionLayer, pages: int, backend: Backend) -> Pages:
    shapes = backend.page_shapes(layer.heads[1], max(layer.dims))
    keys, values = (zeros((pages, *shape), backend.cache_dtype, backend.device) for shape in shapes)
    return keys, values


def _attend_with_sinks(
    qkv: Tensor, heads: Heads, operation: Attention, sequences: Tensor, tables: Tensor, pages: Pages, sinks: Tensor
) -> Tensor:
    """`Backend.attention` where a further score of each head takes part in the softmax, on the reference's pages."""
    (query, kv, dim), (keys, values), window = heads, pages, operation.window
    out = qkv.new_empty(len(qkv), query, dim)
    for first, rows, start, place in sequences.tolist():
        begin = 0 if window is None else max(0, start - window + 1) // PAGE
        end = -(-(start + rows) // PAGE)
        table = tables[place + begin : place + end].long()
        k = keys[table].permute(1, 2, 0, 3).flatten(2).float()  # [kv, dim, tokens]
        v = values[table].permute(1, 0, 2, 3).flatten(1, 2).float()  # [kv, tokens, dim]
        q = qkv[first : first + rows].view(rows, -1, dim)[:, :query].transpose(0, 1).float().reshape(kv, -1, dim)
        scores = (q @ k * operation.scale_of(dim)).view(query, rows, -1)
        scores = operation.cap * torch.tanh(scores / operation.cap) if operation.cap else scores
        at = torch.arange(start, start + rows, device=qkv.device)[:, None]
        token = torch.arange(begin * PAGE, end * PAGE, device=qkv.device)
        hidden = token > at if window is None else (token > at) | (token <= at - window)
        scores = scores.masked_fill(hidden, -math.inf)
        scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, rows, 1)), -1)
        weights = scores.softmax(-1)[..., :-1].reshape(kv, -1, len(token))
        out[first : first + rows] = (weights @ v).view(query, rows, dim).transpose(0, 1).to(out.dtype)
    return out.flatten(1)
