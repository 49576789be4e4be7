"""The decoder of Llama-like families: embedding, layers as a list of operations, final norm and output head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from squawq.backends.base import (
    Backend,
    Batch,
    Follow,
    Layers,
    Model,
    NextLogits,
    RunLayers,
    Steps,
    Tell,
    Vocabulary,
)
from squawq.backends.layer_ops import Operation, Packed
from squawq.config import ModelConfig
from squawq.nn.cache import Cache
from squawq.nn.rope import RotaryTable


@dataclass
class Decoder:
    """A model's weights and layers on one backend, or this process's part of them (tensor parallelism).

    Attributes:
        embedding: [vocab, hidden], floating point.
        norm: float32 [hidden]; weight of the final norm.
        head: [vocab, hidden]; the output head (lm_head).
        vocabulary: Which tokens `embedding` and `head` have; None: all.
    """

    config: ModelConfig
    backend: Backend
    embedding: Tensor
    operations: tuple[Operation, ...]  # of all layers
    norm: Tensor
    head: Packed
    vocabulary: Vocabulary | None = None
    frequencies: Tensor = field(init=False)  # RoPE's: see RotaryTable
    _prepared: tuple[Cache, RunLayers] | None = field(init=False, default=None)  # for the latest cache

    def __post_init__(self) -> None:
        table = RotaryTable(self.config.ropes, self.config.head_dim)
        self.frequencies = table.frequencies.to(self.backend.device)
        # Divided by the factor of what is added to it, the residual stream takes that as it is; norms do not see the
        # difference if eps shrinks as the squares do.
        residual = self.config.scales.residual
        self._eps = self.config.norm_eps / residual**2
        self._embedding_scale = self.config.scales.embedding / residual

    def _layers(self, cache: Cache) -> RunLayers:
        if self._prepared is None or self._prepared[0] is not cache:
            layers = Layers(self.operations, self.config.heads, self._eps)
            self._prepared = cache, self.backend.prepare(layers, cache.layers)
        return self._prepared[1]

    def steps(self, cache: Cache, rows: int, pages: int, tell: Tell | None = None) -> Steps | None:
        """The backend's own way to run steps, for `rows` sequences of `pages` pages. tell: see Backend."""
        return self.backend.prepare_steps(self._model(), cache.layers, rows, pages, tell)

    def follow_steps(self, cache: Cache, rows: int, pages: int) -> Follow | None:
        """`steps` of the other ranks."""
        return self.backend.follow_steps(self._model(), cache.layers, rows, pages)

    def next_logits(self, cache: Cache, rows: int, pages: int) -> NextLogits | None:
        """The backend's own way to run one token of each of `rows` sequences of at most `pages` pages."""
        return self.backend.prepare_next_logits(self._model(), cache.layers, rows, pages)

    def _model(self) -> Model:
        layers = Layers(self.operations, self.config.heads, self._eps)
        scales = self._embedding_scale, self.config.scales.logits_cap
        return Model(layers, self.embedding, self.frequencies, self.norm, self.head, self.vocabulary, *scales)

    def native(self, cache: Cache) -> bool:
        """Whether all layers run in one native call on this cache, without torch's threads."""
        return self.backend.runs_whole(self._layers(cache))

    @torch.inference_mode()
    def __call__(self, batch: Batch, cache: Cache) -> Tensor:
        """Run the batch's tokens, write their keys and values to `cache`; return logits, float32 [outputs, vocab].

        Every rank makes the same call; the logits are rank 0's, others have those of their own tokens.
        """
        hidden = self._embedded(batch.ids)
        rotary = self.backend.rotary(batch.positions, self.frequencies)
        self._layers(cache)(hidden, rotary, batch)
        if not len(batch.outputs):
            return hidden.new_empty(0, self.config.vocab_size)
        rows = hidden if len(batch.outputs) == len(hidden) else hidden[batch.outputs]
        normed = self.backend.add_rms_norm(rows, None, self.norm, self._eps)
        logits, group = self.backend.logits(normed, self.head), self.backend.group
        if cap := self.config.scales.logits_cap:
            logits = self.backend.soft_cap(logits, cap)
        if group is None or self.vocabulary is None:
            return logits
        return group.gather(logits, self.vocabulary.each)

    def _embedded(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, scaled; each rank adds those of its tokens, to zeros."""
        group, vocabulary = self.backend.group, self.vocabulary
        if group is None or vocabulary is None:
            return self.backend.embedding(ids, self.embedding, self._embedding_scale)
        own = (ids >= vocabulary.own.start) & (ids < vocabulary.own.stop)
        rows = torch.where(own, ids - vocabulary.own.start, 0)
        hidden = self.backend.embedding(rows, self.embedding, self._embedding_scale)
        hidden.masked_fill_(~own[:, None], 0)
        group.all_reduce(hidden)
        return hidden
